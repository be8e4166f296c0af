"""All measurements of a comparison, before they are summarised."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.compare.images.open_attributes import OpenCounts
from mmalign.compare.results.training_seeds import Replicas
from mmalign.compare.scores import RewardFacts, Scores
from mmalign.compare.stats import RESAMPLES, category_rows
from mmalign.compare.systems.facts import SystemFacts
from mmalign.data.prompts import Prompt

CATEGORY_MISSING = "(none)"


@dataclass
class Comparison:
    """All measurements of a comparison; the report and results.json are views of it.

    scores: reward label -> system name -> `[prompts, seeds]`; `[prompts, replicas * seeds]` in the order of the
    `replicas` of a system that has them. `image_paths`: system name -> path of each (prompt, seed) of its first
    replica, row by row. `open_counts`: attribute that prompts leave open -> what the systems showed. `sweep` is the
    guidance control's record, `settings` and `command` go into the report as they are. `category_apart`: a category
    beside which all others are shown together. `units`: for each prompt the name of what is resampled with it as one,
    called `over`; None: prompts are. `item` is what a prompt is called, `modality` what systems make: image or video.
    """

    prompts: list[Prompt]
    seeds: list[int]
    baseline: str
    systems: dict[str, SystemFacts]
    rewards: dict[str, RewardFacts]
    scores: dict[str, Scores]
    image_paths: dict[str, list[list[Path]]]
    settings: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    command: str = ""
    created: str = ""
    resamples: int = RESAMPLES
    replicas: Replicas = field(default_factory=dict)
    open_counts: dict[str, OpenCounts] = field(default_factory=dict)
    category_apart: str | None = None
    units: list[str] | None = None
    item: str = "prompt"
    modality: str = "image"
    over: str = "prompts"

    @property
    def training_seeds(self) -> list[int]:
        """The seeds that systems were trained from; none where they were not named."""
        return list(next(iter(self.replicas.values()), {}))

    def scores_by_seed(self, system: str, reward: str) -> dict[int, np.ndarray]:
        """Return the scores `[prompts, seeds]` of each replica of a system, by training seed; empty without any."""
        seeds = self.replicas.get(system, {})
        parts = np.split(self.scores[reward][system], max(1, len(seeds)), axis=1)
        return dict(zip(seeds, parts, strict=False))

    def replicas_in(self, columns: np.ndarray) -> int:
        """Return the number of trainings in columns `[prompts, replicas * seeds]`."""
        return int(columns.shape[1]) // len(self.seeds)

    @property
    def scope(self) -> str:
        """What the intervals of differences are for: these models, or new trainings too."""
        names = [name for name, seeds in self.replicas.items() if len(seeds) > 1]
        if not names:
            return (
                f"Each system is one model: its interval is for this one training on other {self.over}, not for its "
                "method."
            )
        others = [name for name in self.challengers if name not in names]
        rest = f" Those of {', '.join(others)} are for one model each, not for its method." if others else ""
        return f"Intervals of {', '.join(names)} are for other trainings and other {self.over}.{rest}"

    @property
    def measure(self) -> str:
        """The heading in tables of the rewards or measures that compare systems."""
        return "reward" if self.item == "prompt" else "measure"

    @property
    def categories(self) -> list[str]:
        """The category of each prompt; all empty if the set has none."""
        if not any(prompt.category for prompt in self.prompts):
            return [""] * len(self.prompts)
        return [prompt.category or CATEGORY_MISSING for prompt in self.prompts]

    @property
    def category_groups(self) -> dict[str, list[int]]:
        """The rows of each category, and then of all but `category_apart`; none if the set has no categories."""
        if not any(self.categories):
            return {}
        groups = category_rows(self.categories)
        if self.category_apart is not None:
            apart = self.category_apart
            groups[f"all but {apart}"] = [row for row, name in enumerate(self.categories) if name != apart]
        return groups

    @property
    def control(self) -> str | None:
        """The name of the guidance control among the systems, if there is one."""
        return next((name for name, facts in self.systems.items() if facts.control), None)

    @property
    def challengers(self) -> list[str]:
        """The systems that are judged: all but the baseline and its control."""
        return [name for name, facts in self.systems.items() if name != self.baseline and not facts.control]

    def is_trained_on(self, system: str, reward: str) -> bool:
        """Tell whether a system was trained on a reward (by label, name or path), or on one it derives from."""
        facts = self.rewards[reward]
        same = {facts.label, facts.name, facts.requested, *facts.derived_from}
        return bool(same & set(self.systems[system].trained_on))
