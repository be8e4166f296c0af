"""Scores of a comparison, and what is known of the reward that gave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Scores = dict[str, np.ndarray]
"""Store name -> scores `[prompts, seeds]`."""


@dataclass(frozen=True)
class RewardFacts:
    """What the report says about a reward; `requested` is the name or dotted path that it was asked for by."""

    label: str
    name: str
    requested: str
    version: str
    summary: str
    higher_is_better: bool
    differentiable: bool
    licence: str
    source: str
    citation: str
    derived_from: tuple[str, ...] = ()
    neutral: bool = False
    """Whether it is shown like a reward, and neither more nor less of it is better."""

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as results.json holds them."""
        return {name: value for name, value in vars(self).items() if name != "neutral" or value}
