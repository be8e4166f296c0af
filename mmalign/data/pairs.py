"""Preference pairs from any usual source, as one table whose images are read only on access to a pair.

Sources: Pick-a-Pic columns in parquet files, a directory of them or a `datasets` hub id
(`mmalign.data.readers.tabular`); HPDv2-style JSON, JSON or JSONL with `prompt, chosen, rejected`, folders `chosen/`
and `rejected/` (or `w/` and `l/`; `mmalign.data.readers.listed`).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.files import is_dir, visible
from mmalign.core.hashing import uniform
from mmalign.core.io.images import Media
from mmalign.core.progress import note
from mmalign.core.resources import find
from mmalign.data.readers.listed import paired_folders, read_folder_pairs, read_json_pairs
from mmalign.data.readers.source import Candidate, PairSource, check_unique
from mmalign.data.readers.tabular import ParquetPairs, load_hub_pairs, load_saved_pairs

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.]+)?")
_FILE_SUFFIXES = (".parquet", ".json", ".jsonl")
_SHARD = re.compile(r"(\w+?)-\d+-of-\d+")  # as the hub names parquet files: train-00000-of-00645-HASH.parquet


@dataclass(frozen=True)
class PairRecord:
    """One preference: `chosen` was preferred to `rejected` for `prompt`; images are encoded bytes or paths.

    `margin` is the score of chosen minus the score of rejected where the source has scores (negative where a noisy
    label contradicts them). A tie that was kept has its sides in random order and `tie` set.
    """

    prompt: str
    chosen: Media
    rejected: Media
    id: str
    margin: float | None = None
    tie: bool = False


@dataclass
class PairCounts:
    """Counts of the source's comparisons kept and left out."""

    read: int = 0
    kept: int = 0
    ties_kept: int = 0
    ties_dropped: int = 0
    unlabelled: int = 0
    below_margin: int = 0

    def __str__(self) -> str:
        """Return the counts as one line, without the zeros."""
        ties = f" ({self.ties_kept} of them ties)" if self.ties_kept else ""
        dropped = {
            "ties dropped": self.ties_dropped,
            "without a label": self.unlabelled,
            "below min_margin": self.below_margin,
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
        seen: dict[str, int] = {}
        for candidate in source.candidates():
            if self._keep(candidate, config):
                self._append(candidate, seen)
            if config.limit is not None and len(self) >= config.limit:
                break
        self.prompts = list(seen)
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
        )

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
        self.counts.ties_kept += tie
        self._rows.append(candidate.row)
        self._prompt_of.append(seen.setdefault(candidate.prompt, len(seen)))
        self.ids.append(candidate.id)
        self._swapped.append(swapped)
        self._ties.append(tie)
        self._margins.append(-margin if swapped else margin)


def open_source(source: str, caption_column: str = "caption") -> PairSource:
    """Return the reader for a source: chosen by suffix or by the files in a directory; anything else is a hub id.

    Raises:
        UserError: nothing is there, or it is in no known format.
    """
    try:
        path = find(source)
    except UserError:
        first = Path(source).parts[0] if source else ""
        is_local = Path(source).suffix in _FILE_SUFFIXES or is_dir(first)
        if _HUB_ID.fullmatch(source) and not is_local:
            return load_hub_pairs(source, caption_column)
        raise
    if path.is_dir():
        return _open_directory(path, caption_column)
    match path.suffix.lower():
        case ".parquet":
            return ParquetPairs(str(path), [path], caption_column)
        case ".json" | ".jsonl":
            return read_json_pairs(path, caption_column)
        case suffix:
            raise UserError(f"{path}: pairs are not read from '{suffix}' files; use {', '.join(_FILE_SUFFIXES)}")


def _open_directory(path: Path, caption_column: str) -> PairSource:
    folders = paired_folders(path)
    if folders:
        return read_folder_pairs(*folders)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_saved_pairs(path, caption_column)
    files = _training_split(path, visible(path, "**/*.parquet"))
    if files:
        return ParquetPairs(str(path), files, caption_column)
    raise UserError(
        f"{path}: holds no pairs; expected *.parquet with Pick-a-Pic columns, folders chosen/ and rejected/, "
        "or a data set saved by `datasets`"
    )


def _training_split(folder: Path, files: list[Path]) -> list[Path]:
    """Return the files of the split "train" where a folder holds several, as copies of hub data sets do."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.match(file.name)
        splits.setdefault(shard[1] if shard else "", []).append(file)
    if "train" not in splits or len(splits) == 1:
        return files
    others = ", ".join(f"{name or 'other files'} ({len(held)})" for name, held in splits.items() if name != "train")
    note(f"{folder}: reading the split train ({len(splits['train'])} files) and leaving out {others}")
    return splits["train"]


def read_pairs(source: str, config: DataConfig) -> PairTable:
    """Return the pairs of a file, a directory or a hub id, filtered as `config` says; no image is read yet.

    `config` gives `caption_column`, `ties`, `min_margin` and `limit` (the first pairs that pass the filter).

    Raises:
        UserError: no such source, a missing column (those found are listed), an empty source, or nothing left.
    """
    table = PairTable(open_source(source, config.caption_column), config)
    if not table.counts.read:
        raise UserError(f"{source}: holds no pairs")
    if not len(table):
        raise UserError(f"{source}: {table.counts}; try data.ties: keep, a smaller data.min_margin, or label it anew")
    return table
