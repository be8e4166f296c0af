"""Perturbations for making pairs: operators with a difficulty, and their effect on answers.

`"mask+local_shuffle"` applies one operator after another. Operators with a ratio (drop, block_shuffle, block_reverse)
come once for every difficulty, the others once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.io.video_questions import TOPICS, VideoQuestion
from mmalign.core.seeds import derive_seed
from mmalign.data.video.items import QuestionItem, VideoItem
from mmalign.data.video.operators import Effect, Item, Operator, get_operator


@dataclass(frozen=True)
class Perturbation:
    """Operators applied in turn, those that take a ratio with this one."""

    names: tuple[str, ...]
    ratio: int | None = None

    @property
    def name(self) -> str:
        """The operators' names, joined by a plus."""
        return "+".join(self.names)

    def __str__(self) -> str:
        """Return the name with the ratio: "drop/4"."""
        return self.name if self.ratio is None else f"{self.name}/{self.ratio}"

    def _each(self, seed: int) -> list[tuple[Operator, int, dict[str, Any]]]:
        """Each operator with its seed and options."""
        each = []
        for position, name in enumerate(self.names):
            options = {"ratio": self.ratio} if _takes_ratio(name) else {}
            each.append((get_operator(name), derive_seed(seed, position, name), options))
        return each

    def apply(self, media: Tensor | Sequence[Item], seed: int) -> Any:
        """Return perturbed media or, if all operators are temporal, a perturbed list.

        Raises:
            UserError: the operators do not apply, such as a shuffle to a single frame.
        """
        changed: Any = media
        for operator, own_seed, options in self._each(seed):
            changed = operator(changed, seed=own_seed, **options)
        return changed

    def fate(self, item: VideoItem, frames: int | None, seed: int) -> Effect:
        """Return the effect on the right answer to an item, with `frames` frames of its video taken (None: unknown).

        Where only the order of frames changes and the truth of the video is known, the answer is read anew from that,
        if all frames are taken. Else the label maps of the operators decide, for the topic of the question if it is
        known, or for all topics of its aspect.
        """
        if isinstance(item, QuestionItem) and item.truth is not None:
            temporal = all(get_operator(name).temporal for name in self.names)
            if temporal and frames == item.truth.frames:
                order = self.apply(list(range(frames)), seed)
                return _reread(item.question, item.truth.answer(item.question, order))
            return _unless_denied(item.question, self._stated(*item.truth.fact(item.question)))
        topics = [topic for topic, aspect in TOPICS.items() if aspect == item.aspect]
        stated = {self._stated(topic, None) for topic in topics}
        return stated.pop() if len(stated) == 1 else Effect.DEPENDS

    def _stated(self, topic: str, value: str | None) -> Effect:
        """The effect by the label maps: one change among operators that otherwise keep the answer is a change."""
        effects = [get_operator(name).effect(topic, value) for name in self.names]
        if all(effect is Effect.KEEPS for effect in effects):
            return Effect.KEEPS
        changes = effects.count(Effect.CHANGES)
        return Effect.CHANGES if changes == 1 and Effect.DEPENDS not in effects else Effect.DEPENDS


def _reread(question: VideoQuestion, found: str | None) -> Effect:
    if found == question.answer:
        return Effect.KEEPS
    # "no" is not wrong about something that can no longer be seen.
    return Effect.DEPENDS if found is None and question.answer == "no" else Effect.CHANGES


def _unless_denied(question: VideoQuestion, stated: Effect) -> Effect:
    """ "no" may also be right about the new truth, so a change of "no" is only possible."""
    return Effect.DEPENDS if stated is Effect.CHANGES and question.answer == "no" else stated


def _takes_ratio(name: str) -> bool:
    operator = get_operator(name)
    return "ratio" in operator.parameters and "ratio" not in operator.options


def _plain(name: str) -> str:
    bare, *options = name.strip().split(":")
    return ":".join([bare.replace("-", "_"), *options])


def parse_perturbations(names: Sequence[str], difficulties: Sequence[int]) -> list[Perturbation]:
    """Return the perturbations that "drop", "block-reverse" or "mask+crop:area=0.1..0.3" name, at these difficulties.

    An operator whose `ratio` is among its options comes at that difficulty alone.

    Raises:
        UserError: no such operator, one that needs other inputs besides a video, or a difficulty below 2, which
        changes nothing.
    """
    low = [difficulty for difficulty in difficulties if difficulty < 2]
    if low:
        raise UserError(f"difficulty {low[0]}: a difficulty is a ratio of 2 or more; a ratio of 1 changes nothing")
    made = []
    for given in names:
        chain = tuple(_plain(name) for name in given.split("+"))
        for name in chain:
            parameters = get_operator(name).parameters
            needed = [key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
            if needed:
                raise UserError(f"operator '{name}' needs {', '.join(needed)}, which cannot be given here")
        ratios: Sequence[int | None] = difficulties if any(map(_takes_ratio, chain)) else (None,)
        made += [Perturbation(chain, ratio) for ratio in ratios]
    return list(dict.fromkeys(made))
