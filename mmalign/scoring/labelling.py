"""Turn sampled images into preference pairs by a reward: best against worst, Bradley-Terry draws, Pareto frontiers.

Bradley-Terry (1952): P(i is preferred to j) = sigmoid((score_i - score_j) / temperature). Frontiers and calibrated
scores: `mmalign.scoring.calibration`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key, uniform
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.items import Item
from mmalign.core.io.parquet import (
    ForwardReader,
    RowWriter,
    atomic_parquet,
    iterate_columns,
    open_parquet,
    read_metadata,
)
from mmalign.core.progress import note
from mmalign.core.seeds import derive_seed
from mmalign.scoring.calibration import Merits, frontier_pairs, win_rates
from mmalign.scoring.choice import WeightedReward, weighted_total
from mmalign.scoring.engine import Scored, score_items

SOURCE_COLUMNS = ("prompt", "prompt_id", "seed", "image", "model")
PAIR_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("score_0", pa.float64()),
        ("score_1", pa.float64()),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("best_image_uid", pa.string()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.string()),
    ]
)


@dataclass(frozen=True)
class LabelSettings:
    """How pairs are chosen and labelled.

    `best-worst` pairs the best image of a prompt with its worst, the second best with the second worst and so on;
    `bradley-terry` draws pairs at random and draws the winner by that probability, as people vary; `calibrated`
    takes win rates for scores, the mean over the rewards, and draws pairs between the best and the worst frontier
    (win rates are computed from weight times score over `temperature`). Then every label
    is flipped with probability `label_noise`. Pairs of equal score are left out, and those closer than `min_margin`.
    """

    mode: Literal["best-worst", "bradley-terry", "calibrated"] = "best-worst"
    temperature: float = 1.0
    label_noise: float = 0.0
    min_margin: float = 0.0
    pairs_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a value is outside its range.
        """
        allowed = {
            "temperature": (self.temperature > 0, "above 0"),
            "label_noise": (0 <= self.label_noise <= 0.5, "from 0 to 0.5 (every label a coin toss)"),
            "min_margin": (self.min_margin >= 0, "at least 0"),
            "pairs_per_prompt": (self.pairs_per_prompt >= 1, "at least 1"),
        }
        for name, (fits, text) in allowed.items():
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: must be {text}")


TIE, CLOSE = "as ties", "below min_margin"
NOT_FINITE, SINGLE = "with scores that are not finite", "with a single image"


@dataclass
class LabelCounts:
    """Counts of prompts and pairs; `margin_sum` adds score(chosen) - score(rejected) over the pairs kept."""

    prompts: int = 0
    images: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """reason -> prompts that gave no pair"""
    pairs_left_out: int = 0
    """ties and pairs below min_margin, whether or not their prompt gave others"""
    against_score: int = 0
    margin_sum: float = 0.0

    def __str__(self) -> str:
        """Return the counts as one line."""
        mean = self.margin_sum / self.kept if self.kept else math.nan
        reasons = ", ".join(f"{self.left_out[reason]} {reason}" for reason in (TIE, CLOSE, NOT_FINITE, SINGLE))
        others = self.pairs_left_out - self.left_out[TIE] - self.left_out[CLOSE]
        return (
            f"{self.kept} pairs from {self.prompts - self.left_out.total()} of {self.prompts} prompts, "
            f"mean margin {mean:.4g}"
            + (f", {self.against_score} labels against the score" if self.against_score else "")
            + f"; prompts left out: {reasons}"
            + (f"; {others} more pairs left out as ties or below min_margin" if others else "")
        )


def image_prompts(images: Path) -> list[str]:
    """Return the distinct prompts of sampled images, in their order.

    Raises:
        UserError: `images` lacks a column.
    """
    _check_columns(images)
    batches = (batch.column(0).to_pylist() for batch in iterate_columns(images, ("prompt",)))
    return list(dict.fromkeys(text for batch in batches for text in batch))


def label_pairs(
    images: Path,
    rewards: Sequence[WeightedReward],
    out: Path,
    settings: LabelSettings,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> LabelCounts:
    """Score sampled images and write preference pairs to `out` with the columns of Pick-a-Pic, plus score_0, score_1.

    The score is the sum of weight x reward (a reward for which lower is better counts negatively), or for `calibrated`
    the mean win rate. The side of each image is random. Everything random depends on (settings.seed, prompt,
    images) alone. The metadata records rewards, settings and the sampling. `progress` is called with the number of
    images newly scored. A prompt with a score that is not finite is left out, and counted.

    Raises:
        UserError: `images` lacks a column or holds nothing, or no pair is left.
    """
    if not rewards:
        raise UserError("labelling needs at least one reward")
    _check_columns(images)
    counts = LabelCounts()
    metadata = {
        "rewards": [{"name": entry.name, "weight": entry.weight} for entry in rewards],
        "labelling": asdict(settings),
        "sampling": read_metadata(images).get("settings", {}),
    }
    with atomic_parquet(out, PAIR_SCHEMA, metadata) as writer:
        stream = score_items(_items(images), rewards, batch_size=batch_size)
        for _, group in groupby(stream, key=lambda scored: scored.item.extra["prompt_id"]):
            members = list(group)
            parts = [_weighted(scored, rewards, quiet=NOT_FINITE in counts.left_out) for scored in members]
            _label_prompt([scored.item.extra for scored in members], parts, settings, counts, writer)
            if progress is not None:
                progress(len(members))
        if not counts.kept:
            raise UserError(f"{images}: no pair is left to write ({counts})")
    return counts


def _check_columns(images: Path) -> None:
    found = open_parquet(images).schema_arrow.names
    lacking = [name for name in SOURCE_COLUMNS if name not in found]
    if lacking:
        raise missing_columns(str(images), lacking, found, "; give what `mmalign pairs sample` wrote")


def _items(images: Path) -> Iterator[Item]:
    """Yield the sampled images in their order; the row comes with each."""
    reader = ForwardReader(images, SOURCE_COLUMNS)
    for index in range(len(reader)):
        row = reader.row(index)
        yield Item(f"image of '{row['prompt']}'", row["image"], row["prompt"], extra=row)


def _weighted(scored: Scored, rewards: Sequence[WeightedReward], *, quiet: bool) -> list[float]:
    """Return weight x reward for each; more is better."""
    if scored.error:
        raise UserError(f"{scored.item.name}: {scored.error}")
    broken = [(name, value) for name, value in scored.scores.items() if not math.isfinite(value)]
    if broken and not quiet:
        note(
            f"reward '{broken[0][0]}' gave {broken[0][1]} for an {scored.item.name}; "
            "prompts with such a score are left out, and counted at the end"
        )
    return [weighted_total(scored.scores, [entry]) for entry in rewards]


def _label_prompt(
    group: Sequence[Mapping[str, Any]],
    parts: Merits,
    settings: LabelSettings,
    counts: LabelCounts,
    writer: RowWriter,
) -> None:
    counts.prompts += 1
    counts.images += len(group)
    if len(group) < 2 or not all(math.isfinite(part) for row in parts for part in row):
        counts.left_out[SINGLE if len(group) < 2 else NOT_FINITE] += 1
        return
    if settings.mode == "calibrated":
        parts = win_rates(parts, settings.temperature)
        scores = [math.fsum(row) / len(row) for row in parts]
    else:
        scores = [sum(row) for row in parts]
    kept_before, reason = counts.kept, TIE
    uids = [f"{row['prompt_id']}-{row['seed']:016x}" for row in group]
    for better, worse in _choose(scores, parts, group[0]["prompt_id"], settings):
        margin = scores[better] - scores[worse]
        if margin == 0 or margin < settings.min_margin:
            counts.pairs_left_out += 1
            reason = CLOSE if margin else reason
            continue
        name = content_key(uids[better], uids[worse])[:16]
        chosen, rejected = (worse, better) if _is_upset(margin, name, settings) else (better, worse)
        sides = (chosen, rejected) if uniform(settings.seed, "side", name) < 0.5 else (rejected, chosen)
        writer.add(_pair_row([(group[i], uids[i], scores[i], float(i == chosen)) for i in sides], name))
        counts.kept += 1
        counts.against_score += chosen == worse
        counts.margin_sum += scores[chosen] - scores[rejected]
    if counts.kept == kept_before:
        counts.left_out[reason] += 1


def _choose(scores: Sequence[float], parts: Merits, name: str, settings: LabelSettings) -> list[tuple[int, int]]:
    """Return index pairs (higher score, lower score) of one prompt's images."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if settings.mode == "best-worst":
        pairs = [(order[rank], order[-1 - rank]) for rank in range(len(order) // 2)]
    else:
        pairs = list(combinations(order, 2))
        if settings.mode == "calibrated":
            pairs = [(upper, lower) for upper, lower in frontier_pairs(parts) if scores[upper] > scores[lower]]
        random.Random(derive_seed(settings.seed, "draw", name)).shuffle(pairs)
    return pairs[: settings.pairs_per_prompt]


def _is_upset(margin: float, name: str, settings: LabelSettings) -> bool:
    """Tell whether the image of lower score is labelled as preferred."""
    flipped = uniform(settings.seed, "noise", name) < settings.label_noise
    if settings.mode != "bradley-terry":
        return flipped
    upset_probability = 1.0 / (1.0 + math.exp(min(margin / settings.temperature, 700.0)))
    return flipped != (uniform(settings.seed, "preference", name) < upset_probability)


def _pair_row(sides: Sequence[tuple[Mapping[str, Any], str, float, float]], name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"caption": sides[0][0]["prompt"], "has_label": True, "ranking_id": name}
    for number, (image, uid, score, label) in enumerate(sides):
        row |= {
            f"jpg_{number}": image["image"],
            f"label_{number}": label,
            f"score_{number}": score,
            f"image_{number}_uid": uid,
            f"model_{number}": image["model"],
        }
        if label:
            row["best_image_uid"] = uid
    return row
