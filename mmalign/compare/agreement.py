"""How often rewards agree with human labels: pairwise accuracy, with intervals over prompts and by category.

A reward is right about a pair if it scores the preferred image higher (lower, where lower is better). Scores that are
equal within rounding count one half, as a guess would. Pairs that people found equal say nothing and are left out
before. Pairs of one prompt are not independent, so the intervals resample prompts with all their pairs (percentile
bootstrap, 95 %); every pair weighs the same.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.compare.stats import RESAMPLES, Ci, category_rows, mean_interval
from mmalign.core.errors import UserError
from mmalign.core.files import check_output, write_atomically
from mmalign.core.io.items import Item
from mmalign.core.io.spreadsheet import write_csv
from mmalign.core.progress import note
from mmalign.data.pairs import PairRecord
from mmalign.scoring.agreement import pair_outcome
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.engine import Scored, score_items

ALL = "all"
"""The name of the line over all categories."""
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Accuracy:
    """The agreement on some pairs; `accuracy` is (right + ties / 2) / pairs, in 0..1."""

    pairs: int
    prompts: int
    right: int
    wrong: int
    ties: int
    accuracy: float
    ci95: Ci


@dataclass
class Agreement:
    """The agreement of one reward with the labels; `unscored` pairs have no score and are left out."""

    label: str
    version: str
    overall: Accuracy | None
    by_category: dict[str, Accuracy]
    unscored: int

    def lines(self) -> list[tuple[str, Accuracy]]:
        """Return the accuracy over all pairs and of each category, by its name."""
        return [] if self.overall is None else [(ALL, self.overall), *self.by_category.items()]


def measure_agreement(
    pairs: Iterable[PairRecord],
    rewards: Sequence[WeightedReward],
    *,
    batch_size: int = 32,
    resamples: int = RESAMPLES,
    progress: Callable[[int], None] | None = None,
) -> list[Agreement]:
    """Score both images of every pair by every reward in one pass, and compare the order with the labels.

    A pair with an image that cannot be read or scored is left out, named (the first few) and counted. `progress` is
    called with the number of images newly scored.

    Raises:
        UserError: a pair is a tie, which no reward can be right about.
    """
    won: dict[str, list[float]] = {entry.name: [] for entry in rewards}
    prompts: list[str] = []
    categories: list[str] = []
    faults = 0
    stream = score_items(_items(pairs), rewards, batch_size=batch_size)
    for chosen, rejected in zip(stream, stream, strict=True):
        record: PairRecord = chosen.item.extra
        faults = _report(chosen, rejected, faults)
        prompts.append(record.prompt)
        categories.append(record.category)
        for entry in rewards:
            sign = 1.0 if entry.reward.higher_is_better else -1.0
            scores = [sign * one.scores.get(entry.name, math.nan) for one in (chosen, rejected)]
            won[entry.name].append(pair_outcome(*scores))
        if progress is not None:
            progress(2)
    versions = {entry.name: str(getattr(entry.reward, "version", "")) for entry in rewards}
    return [
        _summarise(name, versions[name], np.array(values), prompts, categories, resamples)
        for name, values in won.items()
    ]


def _items(pairs: Iterable[PairRecord]) -> Iterator[Item]:
    for pair in pairs:
        if pair.tie:
            raise UserError(f"pair '{pair.id}' is a tie; read the pairs with ties: drop")
        for side, media in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            yield Item(f"{side} image of pair '{pair.id}'", media, pair.prompt, extra=pair)


def _report(chosen: Scored, rejected: Scored, faults: int) -> int:
    """Name what cannot be scored, and return the number of faults so far."""
    for one in (chosen, rejected):
        if one.error:
            if faults < SHOWN_FAULTS:
                note(f"{one.item.name}: {one.error}; the pair is left out")
            faults += 1
    return faults


def _summarise(
    label: str, version: str, won: np.ndarray, prompts: Sequence[str], categories: Sequence[str], resamples: int
) -> Agreement:
    scored = np.flatnonzero(np.isfinite(won)).tolist()

    def accuracy(rows: Sequence[int]) -> Accuracy:
        values, units = won[list(rows)], [prompts[row] for row in rows]
        right, ties = int((values == 1).sum()), int((values == 0.5).sum())
        interval = mean_interval(values, units=units, resamples=resamples)
        wrong = len(values) - right - ties
        return Accuracy(len(values), len(set(units)), right, wrong, ties, float(values.mean()), interval)

    groups = category_rows([categories[row] for row in scored])
    named = {name: accuracy([scored[row] for row in rows]) for name, rows in groups.items() if name}
    overall = accuracy(scored) if scored else None
    return Agreement(label, version, overall, named, len(won) - len(scored))


FIELDS = ("reward", "category", "pairs", "prompts", "right", "wrong", "ties", "accuracy", "low", "high")


def check_format(out: Path) -> None:
    """Refuse an output that is neither JSON nor CSV, or cannot be written, before the work starts.

    Raises:
        UserError: see above.
    """
    if out.suffix.lower() not in (".json", ".csv"):
        raise UserError(f"--out {out}: agreement is written as JSON or CSV; name the file {out.stem}.json")
    check_output(out, folder=False)


def write_agreement(agreements: Sequence[Agreement], out: Path, about: dict[str, Any]) -> None:
    """Write a JSON file with `about` and everything measured, or the table as CSV (without `about`)."""
    if out.suffix.lower() == ".csv":
        buffer = io.StringIO()
        rows = [_row(one.label, name, line) for one in agreements for name, line in one.lines()]
        write_csv(buffer, [list(FIELDS), *rows])
        write_atomically(out, buffer.getvalue())
        return
    document = {**about, "rewards": {one.label: _as_dict(one) for one in agreements}}
    write_atomically(out, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _row(label: str, category: str, line: Accuracy) -> list[Any]:
    low, high = line.ci95 or ("", "")
    return [label, category, line.pairs, line.prompts, line.right, line.wrong, line.ties, line.accuracy, low, high]


def _as_dict(one: Agreement) -> dict[str, Any]:
    return {
        "version": one.version,
        "unscored": one.unscored,
        **(vars(one.overall) if one.overall else {}),
        "by_category": {name: vars(line) for name, line in one.by_category.items()},
    }
