"""Scores of a comparison, and facts about the reward that gave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Scores = dict[str, np.ndarray]
"""Store name -> scores `[prompts, seeds]`."""


@dataclass(frozen=True)
class RewardFacts:
    """Facts of a reward for the report; `requested` is the name or dotted path in the config."""

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
    """Whether it is shown like a reward although neither more nor less of it is better."""

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for results.json."""
        return {name: value for name, value in vars(self).items() if name != "neutral" or value}
