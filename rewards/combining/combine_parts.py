"""One part of a combination: a reward, and the shaping of its scores before they are combined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rewards.base import Reward
from rewards.bases.derived import load_inner
from rewards.combining.combine_modes import WEIGHTED
from rewards.combining.transforms import Transform, make_transform
from rewards.errors import RewardError, choices

_OWN = ("name", "weight", "factor", "offset", "transform", "gate")


class Part(nn.Module):
    """One reward of a combination, with the shaping of its scores."""

    def __init__(self, label: str, spec: Any, common: Mapping[str, Any]) -> None:
        """Load the reward that a specification names, or take one that is given."""
        super().__init__()
        spec = _as_mapping(label, spec)
        own = {key: spec.pop(key) for key in _OWN if key in spec}
        self.label = label
        numbers = {key: _number(label, key, own.get(key)) for key in ("weight", "gate", "factor", "offset")}
        self.weight, self.gate = numbers["weight"], numbers["gate"]
        self.factor = 1.0 if numbers["factor"] is None else numbers["factor"]
        self.offset = numbers["offset"] or 0.0
        if self.factor == 0:
            raise RewardError(f"part {label!r}: factor is 0; remove the part")
        if self.gate is not None and set(own) - {"name", "gate"}:
            raise RewardError(
                f"part {label!r} is a gate, which takes no weight, transform, factor or offset; remove them"
            )
        self.transform: Transform | None = None
        if own.get("transform") is not None:
            self.transform = make_transform(own["transform"], label)
        try:
            self.reward: Reward = load_inner({"name": own.get("name", label), **spec}, common)
        except RewardError as error:
            raise RewardError(f"part {label!r}: {error}") from error

    @property
    def needs(self) -> frozenset[str]:
        """The needs of the reward and of its transform."""
        return self.reward.needs | ({"prompts"} if self.transform and self.transform.needs_prompts else frozenset())

    @property
    def batch_invariant(self) -> bool:
        """Whether the score of a sample is independent of the rest of the batch."""
        return self.reward.batch_invariant and (self.transform is None or self.transform.batch_invariant)

    @property
    def range(self) -> tuple[float, float]:
        """Bounds of the shaped score."""
        low, high = self.reward.range
        if self.transform is not None:
            low, high = self.transform.bounds(low, high)
        ends = sorted((self.factor * low + self.offset, self.factor * high + self.offset))
        return ends[0], ends[1]

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Transform scores, then `factor * score + offset`."""
        if self.transform is not None:
            scores = self.transform.shape(scores, prompts, learn)
        return self.factor * scores + self.offset

    def is_open(self, scores: Tensor) -> Tensor:
        """Return where the gate is open: for scores at the threshold or better; NaN closes it."""
        assert self.gate is not None
        return scores >= self.gate if self.reward.higher_is_better else scores <= self.gate

    def __str__(self) -> str:
        """Return everything that the shaped score depends on."""
        shaped = f"{self.reward.name} ({self.reward.version})"
        if self.gate is not None:
            return f"gate {shaped} {self.gate:g}"
        shaped = f"{self.transform.described}({shaped})" if self.transform is not None else shaped
        weight = 1.0 if self.weight is None else self.weight
        return f"{weight:g} * [{self.factor:g} * {shaped} + {self.offset:g}]"


def weights_of(parts: Sequence[Part], mode: str, normalise: bool) -> list[float]:
    """Return the weight of each part, 1 if the mode takes none; refuse weights that the mode does not allow."""
    given = [part.weight for part in parts]
    if mode not in WEIGHTED:
        if any(weight is not None for weight in given):
            raise RewardError(f"combine: mode {mode!r} takes no weights; {choices('', WEIGHTED)} do")
        return [1.0] * len(given)
    if mode == "weighted-sum" and not normalise:
        return [1.0 if weight is None else weight for weight in given]
    if all(weight is None for weight in given):
        return [1 / len(given)] * len(given)
    weights = [weight for weight in given if weight is not None]
    if len(weights) < len(given):
        missing = ", ".join(part.label for part in parts if part.weight is None)
        raise RewardError(f"combine: no weight for {missing}; give every part a weight, or none")
    total = sum(weights)
    if min(weights) < 0 or total == 0:
        raise RewardError(f"combine: weights are {weights}; mode {mode!r} needs them positive")
    if normalise:
        return [weight / total for weight in weights]
    if abs(total - 1) > 1e-6:
        raise RewardError(f"combine: the weights add up to {total:g}; {mode} needs 1, or normalise=True")
    return weights


def check_direction(parts: Sequence[Part], weights: Sequence[float], mode: str) -> None:
    """Raise `RewardError` if a part for which lower is better would be maximised."""
    for part, weight in zip(parts, weights, strict=True):
        if not part.reward.higher_is_better and part.factor * weight > 0:
            raise RewardError(
                f"combine: part {part.label!r}: lower is better for {part.reward.name}, so that it would be "
                "driven the wrong way; give it factor: -1" + (" or a negative weight" * (mode in WEIGHTED[:1]))
            )


def _as_mapping(label: str, spec: Any) -> dict[str, Any]:
    if isinstance(spec, Reward):
        return {"name": spec}
    if spec is None:
        return {}
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        return {"weight": spec}
    if not isinstance(spec, Mapping):
        raise RewardError(f"part {label!r} is {spec!r}; give its options as a mapping, or a weight")
    return dict(spec)


def _number(label: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RewardError(f"part {label!r}: {key} is {value!r}; a finite number is expected")
    return float(value)
