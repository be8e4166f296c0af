"""Perturbations of videos, images and lists of captions, and their effect on the truth of answers.

`perturb("block_shuffle", video, seed=3, ratio=8)` works on media `[F, 3, H, W]` or `[3, H, W]` (floats in [0, 1] or
uint8). A temporal one also works on any list with an item for each clip. The same seed and options give the same
result everywhere; shapes (number of frames aside) and dtypes are kept and inputs are never changed.

The effects are the oracle label map of procedural video: for every topic of `mmalign.core.io.video_questions.TOPICS`
(and, where it matters, for single answers), whether the answer stays, becomes false, or has to be read anew. They hold
for default options; the tests compare them with re-rendered Shapes videos.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.io.video_questions import STATIC, TOPICS
from mmalign.core.seeds import derive_seed
from mmalign.data.video import frame_changes as picture_changes
from mmalign.data.video import frame_orders

Item = TypeVar("Item")


class Effect(StrEnum):
    """The effect on a right answer."""

    KEEPS = "keeps"
    CHANGES = "changes"
    DEPENDS = "depends"


_ORDER = ("first", "last")
_UNCHANGING = (("direction", "still"), ("motion", "still"), ("growth", "same"), ("recolouring", "same"),
               ("presence", "always"))  # fmt: skip
"""Answers that nothing happens: no order of the same frames makes them false."""

Effects = Mapping[str | tuple[str, str], Effect]


def _effects(*, keeps: Sequence[str | tuple[str, str]] = (), changes: Sequence[str | tuple[str, str]] = ()) -> Effects:
    """A label map; topics that are not named depend on the instance."""
    stated: dict[str | tuple[str, str], Effect] = dict.fromkeys(TOPICS, Effect.DEPENDS)
    return stated | dict.fromkeys(changes, Effect.CHANGES) | dict.fromkeys(keeps, Effect.KEEPS)


@dataclass(frozen=True)
class Operator:
    """One perturbation: temporal (it chooses and orders frames, see `indices`), or of the content of frames.

    options: those that are set in advance; the effects are then stated for no answer.
    """

    name: str
    function: Callable[..., Any]
    temporal: bool
    effects: Effects
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """A description in one line."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def effect(self, topic: str, answer: str | None = None) -> Effect:
        """The effect on `answer` to `topic`; without an answer, on every answer to it.

        Raises:
            UserError: no such topic.
        """
        if topic not in TOPICS:
            raise UserError(f"unknown topic '{topic}'{did_you_mean(topic, TOPICS)} ({', '.join(TOPICS)})")
        if answer is not None:
            return self.effects.get((topic, answer), self.effects[topic])
        all_answers = {effect for key, effect in self.effects.items() if key == topic or key[0] == topic}
        return all_answers.pop() if len(all_answers) == 1 else Effect.DEPENDS

    def indices(self, count: int, *, seed: int = 0, **options: Any) -> list[int]:
        """The indices of the items that remain of `count`, in their new order.

        Raises:
            UserError: it is not temporal, or an option is wrong.
        """
        if not self.temporal:
            raise UserError(f"{self.name} changes frames, not their order; only temporal operators take a list")
        if count < 1:
            raise UserError(f"{self.name}: no frame is given")
        options = self._checked(options)
        return list(self.function(count, np.random.default_rng([seed, count]), **options))

    def __call__(self, media: Tensor | Sequence[Item], *, seed: int = 0, **options: Any) -> Tensor | list[Item]:
        """Perturb media or, if the operator is temporal, a list of captions.

        Raises:
            UserError: an option is wrong, or the operator does not apply to the input.
        """
        if not isinstance(media, Tensor):
            return [media[index] for index in self.indices(len(media), seed=seed, **options)]
        _check_media(media, self)
        if self.temporal:
            return media[self.indices(len(media), seed=seed, **options)]
        options = self._checked(options)
        # Drawn on the CPU, so that every device gives the same result.
        rng = torch.Generator().manual_seed(derive_seed("perturb", seed))
        return self.function(media, rng, **options)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The options by name."""
        return dict([*inspect.signature(self.function).parameters.items()][2:])

    def with_options(self, texts: Mapping[str, str]) -> Operator:
        """Return the operator with these options set, given as text; it is tried on blank frames.

        Raises:
            UserError: it has no such option, or a value is of another kind or out of range.
        """
        self._checked(texts)
        options = {name: _value(self, name, text) for name, text in texts.items()}
        operator = replace(self, options=options, effects=_effects())
        operator(torch.zeros(8, 3, 4, 4))
        return operator

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        allowed = list(self.parameters)
        for name in options:
            if name not in allowed:
                listed = f"it takes {', '.join(allowed)}" if allowed else "it takes no options"
                raise UserError(f"{self.name} has no option '{name}'{did_you_mean(name, allowed)} ({listed})")
        return {**self.options, **options}


def _value(operator: Operator, option: str, text: str) -> Any:
    """Return the value of an option, of the kind of its default."""
    default = operator.parameters[option].default
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            low, high = text.split("..")
            return float(low), float(high)
        return float(text) if isinstance(default, float) else int(text)
    except (ValueError, KeyError):
        kind = _KINDS.get(type(default), "a whole number")
        raise UserError(f"{operator.name}: {option}={text}; give {kind}") from None


_KINDS = {bool: "true or false", tuple: "a range, such as 0.1..0.3", float: "a number"}


def _check_media(media: Tensor, operator: Operator) -> None:
    if media.ndim not in (3, 4) or media.shape[-3] != 3:
        raise UserError(f"{operator.name} takes [F, 3, H, W] or [3, H, W], not {list(media.shape)}")
    if operator.temporal and media.ndim == 3:
        raise UserError(f"{operator.name} re-orders the frames of a video; an image has none")
    if not (media.is_floating_point() or media.dtype == torch.uint8):
        raise UserError(f"{operator.name} takes floats in [0, 1] or uint8, not {media.dtype}")


_REORDERED = _effects(keeps=(*STATIC, *_UNCHANGING))

OPERATORS: dict[str, Operator] = {
    function.__name__: Operator(function.__name__, function, function.__module__ == frame_orders.__name__, effects)
    for function, effects in (
        (frame_orders.drop, _effects()),
        (frame_orders.block_shuffle, _REORDERED),
        (frame_orders.block_reverse, _REORDERED),
        (frame_orders.local_shuffle, _REORDERED),
        (
            frame_orders.reverse,
            _effects(
                keeps=(*STATIC, "speed", "motion", *_UNCHANGING, ("presence", "hides"), ("presence", "flashes")),
                changes=("direction", *_ORDER, "growth", "recolouring", "presence"),
            ),
        ),
        (
            frame_orders.freeze,
            _effects(
                keeps=_UNCHANGING,
                changes=("direction", "speed", *_ORDER, "growth", "recolouring", "motion", "presence"),
            ),
        ),
        (
            frame_orders.subsample,
            _effects(
                keeps=(*STATIC, "direction", "speed", *_ORDER, "growth", "recolouring", "presence", *_UNCHANGING)
            ),
        ),
        (
            frame_orders.event_swap,
            _effects(
                keeps=(*STATIC, *_UNCHANGING),
                changes=(*_ORDER, "growth", "recolouring", "presence"),
            ),
        ),
        (picture_changes.mask, _effects()),
        (picture_changes.crop, _effects()),
        (
            picture_changes.hue,
            _effects(
                keeps=(
                    "count",
                    "direction",
                    "speed",
                    *_ORDER,
                    "growth",
                    "motion",
                    "presence",
                    ("recolouring", "same"),
                ),
                changes=("colour", "recolouring"),
            ),
        ),
        (
            picture_changes.flip,
            _effects(
                keeps=[topic for topic in TOPICS if topic != "direction"]
                + [("direction", way) for way in ("up", "down", "still")],
                changes=("direction",),
            ),
        ),
        (picture_changes.frame_noise, _effects()),
        (picture_changes.diffusion_noise, _effects()),
        (picture_changes.black, _effects(changes=tuple(TOPICS))),
        (picture_changes.neighbour, _effects()),
    )
}
"""name -> operator."""


@cache
def get_operator(name: str) -> Operator:
    """Return an operator by its name, perhaps with options: "mask", "crop:area=0.01..0.2", "frame_noise:std=0.5".

    Raises:
        UserError: there is none of that name, it has no such option, or a value is of another kind or out of range.
    """
    bare, *settings = name.split(":")
    if bare not in OPERATORS:
        raise UserError(f"unknown operator '{bare}'{did_you_mean(bare, OPERATORS)} ({', '.join(OPERATORS)})")
    options = dict(setting.partition("=")[::2] for setting in settings)
    return OPERATORS[bare].with_options(options) if options else OPERATORS[bare]


def perturb(name: str, media: Tensor | Sequence[Item], *, seed: int = 0, **options: Any) -> Tensor | list[Item]:
    """Apply the operator of that name; see :class:`Operator`."""
    return get_operator(name)(media, seed=seed, **options)
