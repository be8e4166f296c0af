"""A requested reward, a loaded reward, and the signed weighted sum of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Score = TypeVar("Score", float, "Tensor")

TIE_TOLERANCE = 1e-6
"""Scores closer than this (absolute, or relative for large ones) tie: float32 rounding must not decide a win."""
TOTAL = "total"
"""The column of the weighted sum."""
TEXT_COLUMNS = ("id", "path", "prompt", "error", "stamp")
"""The columns beside the scores, which no label of a reward can be."""


@dataclass(frozen=True)
class Choice:
    """A requested reward; `weight` None: not in the sum, or 1 if other rewards have weights."""

    name: str
    label: str
    weight: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightedReward:
    """A loaded reward, the label of its scores, and its weight in the sum that decides."""

    name: str
    weight: float
    reward: Any


def weighted_total(scores: Mapping[str, Score], rewards: Sequence[WeightedReward]) -> Score:
    """Return the sum of weight x score, numbers or tensors; a reward for which lower is better counts negatively.

    Raises:
        TypeError: there is no reward.
    """
    signs = (1.0 if entry.reward.higher_is_better else -1.0 for entry in rewards)
    return reduce(add, (entry.weight * sign * scores[entry.name] for entry, sign in zip(rewards, signs, strict=True)))
