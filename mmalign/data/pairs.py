"""Preference pairs from any usual source, as one table whose images are read only on access to a pair.

Sources: tables in the layouts of published sets (`mmalign.data.readers.layouts`) as parquet, JSON, JSONL, CSV, TSV or
a `datasets` hub id; folders `chosen/` and `rejected/` (or `w/` and `l/`) and tars (`mmalign.data.readers.listed`); and
folders, globs and lists of all of these (`mmalign.data.readers.opening`).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.hashing import uniform
from mmalign.core.io.images import Media
from mmalign.data.rarity import rarity_weights
from mmalign.data.readers.opening import open_source
from mmalign.data.readers.source import NO_FACTS, Candidate, ClipFacts, PairSource, check_unique


@dataclass(frozen=True)
class PairRecord:
    """One preference: `chosen` was preferred to `rejected` for `prompt`; images are encoded bytes or paths.

    `margin` is the score of chosen minus the score of rejected where the source has scores (negative where a noisy
    label contradicts them). A tie that was kept has its sides in random order and `tie` set. `category` is that of the
    prompt, empty where the source has none. `fps` are the frames a second that the source states of either side, NaN
    where it states none.
    """

    prompt: str
    chosen: Media
    rejected: Media
    id: str
    margin: float | None = None
    tie: bool = False
    category: str = ""
    fps: tuple[float, float] = NO_FACTS.fps


@dataclass
class PairCounts:
    """Counts of the source's comparisons kept and left out."""

    read: int = 0
    kept: int = 0
    ties_kept: int = 0
    ties_dropped: int = 0
    unlabelled: int = 0
    below_margin: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """rows that are no comparison, by what they lack"""

    def __str__(self) -> str:
        """Return the counts as one line, without the zeros."""
        ties = f" ({self.ties_kept} of them ties)" if self.ties_kept else ""
        dropped = {
            "ties dropped": self.ties_dropped,
            "without a label": self.unlabelled,
            "below min_margin": self.below_margin,
            **self.faults,
        }
        return f"{self.kept} pairs kept{ties} of {self.read} read" + "".join(
            f", {count} {what}" for what, count in dropped.items() if count
        )


class PairTable:
    """The pairs kept from one source: a compact index in memory, the images in place.

    Iterate for the cheapest access (forwards through the source); `table[i]` works everywhere.
    """

    def __init__(self, source: PairSource, config: DataConfig) -> None:
        """Index the source; called by `read_pairs`."""
        self.name, self.metadata = source.name, source.metadata
        self.counts = PairCounts()
        self.prompts: list[str] = []
        self.ids: list[str] = []
        self._source = source
        self._prompt_of, self._rows = array("l"), array("l")
        self._swapped, self._ties = array("b"), array("b")
        self._margins = array("d")
        self.score_range = (math.inf, -math.inf)
        self._category_of, categories = array("l"), dict[str, int]()
        self._clips: dict[int, ClipFacts] = {}
        self._scores, self._rarity = array("d"), config.rarity
        seen: dict[str, int] = {}
        for candidate in source.candidates():
            if self._keep(candidate, config):
                self._append(candidate, seen)
                self._category_of.append(categories.setdefault(candidate.category, len(categories)))
            if config.limit is not None and len(self) >= config.limit:
                break
        self.prompts, self._categories = list(seen), list(categories)
        check_unique(self.ids, self.name)

    def __len__(self) -> int:
        """Return the number of pairs kept."""
        return len(self._rows)

    def __iter__(self) -> Iterator[PairRecord]:
        """Yield every pair in the order of the source."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> PairRecord:
        """Return one pair; images come as bytes or paths, not decoded."""
        sides = self._source.images(self._rows[index])
        chosen, rejected = sides[::-1] if self._swapped[index] else sides
        margin = self._margins[index]
        return PairRecord(
            prompt=self.prompts[self._prompt_of[index]],
            chosen=chosen,
            rejected=rejected,
            id=self.ids[index],
            margin=None if math.isnan(margin) else margin,
            tie=bool(self._ties[index]),
            category=self._categories[self._category_of[index]],
            fps=self.clip(index).fps,
        )

    def first_frame(self, index: int) -> Media | None:
        """Return the image that both videos of a pair start from, None where the source does not give it."""
        return self._source.first_frame(self._rows[index])

    def clip(self, index: int) -> ClipFacts:
        """Return what the source states of a pair as videos, the chosen side first."""
        return self._clips.get(index, NO_FACTS)

    @property
    def weighed(self) -> bool:
        """Whether any pair has a weight of its own or labelled segments."""
        own = any(not math.isnan(clip.weight) or clip.segments for clip in self._clips.values())
        return own or self._rarity is not None

    def weights(self) -> list[float]:
        """Return the weight of every pair in the loss, NaN where the source has none.

        With `data.rarity` it is multiplied by that of `mmalign.data.rarity.rarity_weights`.
        """
        own = [self.clip(index).weight for index in range(len(self))]
        if self._rarity is None:
            return own
        self.require_margins("diffusion_dpo with data.rarity")
        rare = rarity_weights(self._scores[0::2], self._scores[1::2], self._rarity)
        return [(1.0 if math.isnan(one) else one) * factor for one, factor in zip(own, rare, strict=True)]

    def prompt_index(self, index: int) -> int:
        """Return where the prompt of a pair stands in `prompts`, which holds each prompt once."""
        return self._prompt_of[index]

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the texts of a pair: its prompt alone."""
        return (self.prompts[self._prompt_of[index]],)

    def ties(self) -> list[bool]:
        """Return for every pair whether neither side was preferred."""
        return [bool(tie) for tie in self._ties]

    def margins(self) -> list[float]:
        """Return the margin of every pair, NaN where the source has no scores."""
        return list(self._margins)

    def require_margins(self, method: str) -> list[float]:
        """Return the margin of every pair, for a method that learns from them.

        Raises:
            UserError: a pair has no scores.
        """
        lacking = sum(map(math.isnan, self._margins))
        if lacking:
            raise UserError(
                f"method '{method}' learns from the scores of each pair, and {lacking} of {len(self)} pairs of "
                f"{self.name} have none (score_0, score_1); make pairs by `mmalign pairs label --reward NAME`, or "
                "choose method diffusion_dpo"
            )
        return self.margins()

    def _keep(self, candidate: Candidate, config: DataConfig) -> bool:
        counts = self.counts
        counts.read += 1
        if candidate.fault:
            counts.faults[candidate.fault] += 1
            return False
        if math.isnan(candidate.label_0) or math.isnan(candidate.label_1):
            counts.unlabelled += 1
            return False
        if candidate.label_0 == candidate.label_1 and config.ties == "drop":
            counts.ties_dropped += 1
            return False
        if config.min_margin is not None:
            if math.isnan(candidate.score_0) or math.isnan(candidate.score_1):
                raise UserError(
                    f"data.min_margin: {self.name} has no scores for pair '{candidate.id}' "
                    "(columns score_0, score_1, as `mmalign pairs label` writes them); remove min_margin"
                )
            if abs(candidate.score_0 - candidate.score_1) < config.min_margin:
                counts.below_margin += 1
                return False
        counts.kept += 1
        return True

    def _append(self, candidate: Candidate, seen: dict[str, int]) -> None:
        tie = candidate.label_0 == candidate.label_1
        # If a tie always meant "first side chosen", a bias of the source's order would become a preference.
        swapped = uniform("tie", candidate.id) < 0.5 if tie else candidate.label_1 > candidate.label_0
        margin = candidate.score_0 - candidate.score_1
        if not math.isnan(margin):
            scores = (candidate.score_0, candidate.score_1)
            self.score_range = (min(self.score_range[0], *scores), max(self.score_range[1], *scores))
        if candidate.clip != NO_FACTS:
            self._clips[len(self)] = candidate.clip.swapped() if swapped else candidate.clip
        self._scores.extend((candidate.score_0, candidate.score_1))
        self.counts.ties_kept += tie
        self._rows.append(candidate.row)
        self._prompt_of.append(seen.setdefault(candidate.prompt, len(seen)))
        self.ids.append(candidate.id)
        self._swapped.append(swapped)
        self._ties.append(tie)
        self._margins.append(-margin if swapped else margin)


def read_pairs(source: str, config: DataConfig) -> PairTable:
    """Return the pairs of a source (see the module), filtered as `config` says; no image is read yet.

    `config` gives `caption_column`, `columns`, `default_prompt`, `streaming`, `ties`, `min_margin` and `limit` (the
    first pairs that pass the filter).

    Raises:
        UserError: no such source, a missing column (those found are listed), an empty source, or nothing left.
    """
    table = PairTable(open_source(source, config), config)
    if not table.counts.read:
        raise UserError(f"{source}: holds no pairs")
    if not len(table):
        fix = "; try data.ties: keep, a smaller data.min_margin, or label it anew"
        raise UserError(f"{source}: {table.counts}{'' if table.counts.faults.total() == table.counts.read else fix}")
    return table
