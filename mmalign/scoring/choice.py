"""A reward that was asked for, a reward that was loaded, and the signed weighted sum of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOTAL = "total"
"""The column of the weighted sum."""


@dataclass(frozen=True)
class Choice:
    """A reward that was asked for; `weight` None: it takes no part in a sum, unless others do (then 1)."""

    name: str
    label: str
    weight: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightedReward:
    """A loaded reward, what its scores are called, and its weight in the sum that decides."""

    name: str
    weight: float
    reward: Any


def weighted_total(scores: Mapping[str, float], rewards: Sequence[WeightedReward]) -> float:
    """Return the sum of weight x score; a reward for which lower is better counts negatively."""
    return sum(
        entry.weight * (1.0 if entry.reward.higher_is_better else -1.0) * scores[entry.name] for entry in rewards
    )
