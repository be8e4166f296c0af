"""Turn pictures into preference pairs by a reward: best against worst, Bradley-Terry draws, Pareto frontiers.

The pictures are sampled images, one's own, or those of existing pairs, which the reward confirms or flips.

Bradley-Terry (1952): P(i is preferred to j) = sigmoid((score_i - score_j) / temperature). Frontiers and calibrated
scores: `mmalign.scoring.calibration`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations, groupby, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key, uniform
from mmalign.core.io.parquet import RowWriter, atomic_parquet, read_metadata
from mmalign.core.progress import note
from mmalign.core.seeds import derive_seed
from mmalign.scoring.calibration import Merits, frontier_pairs, win_rates
from mmalign.scoring.choice import WeightedReward, weighted_total
from mmalign.scoring.engine import Scored, score_items
from mmalign.scoring.pictures import Picture, check_sampled, sampled_pictures
from mmalign.scoring.votes import score_by_votes

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
FIRST_FRAME = pa.field("first_frame", pa.binary())
"""A further column, where the first pictures name the image that they started from."""


@dataclass(frozen=True)
class LabelSettings:
    """How pairs are chosen and labelled.

    `best-worst` pairs the best image of a prompt with its worst, the second best with the second worst and so on;
    `bradley-terry` draws pairs at random and draws the winner by that probability, as people vary; `calibrated`
    takes win rates for scores, the mean over the rewards, and draws pairs between the best and the worst frontier
    (win rates are computed from weight times score over `temperature`); `votes` is `best-worst` by the share of won
    comparisons with the other images of the prompt (`mmalign.scoring.votes`). Then every label
    is flipped with probability `label_noise`. Pairs of equal score are left out, and those closer than `min_margin`.
    """

    mode: Literal["best-worst", "bradley-terry", "calibrated", "votes"] = "best-worst"
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
UNREADABLE = "with an image that cannot be read"
SHOWN_FAULTS = 5
"""Prompts whose pictures cannot be read that are named; all are counted."""


@dataclass
class LabelCounts:
    """Counts of prompts and pairs; `margin_sum` adds score(chosen) - score(rejected) over the pairs kept.

    Of existing pairs each counts as a prompt of its own; `flipped` ones got another winner, `decided` ones were ties.
    """

    prompts: int = 0
    images: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """reason -> prompts that gave no pair"""
    pairs_left_out: int = 0
    """ties and pairs below min_margin, whether or not their prompt gave others"""
    against_score: int = 0
    margin_sum: float = 0.0
    relabelled: bool = False
    flipped: int = 0
    decided: int = 0

    def __str__(self) -> str:
        """Return the counts as one line."""
        mean = self.margin_sum / self.kept if self.kept else math.nan
        if self.relabelled:
            return self._of_pairs(mean)
        shown = (TIE, CLOSE, NOT_FINITE, SINGLE, *([UNREADABLE] if self.left_out[UNREADABLE] else []))
        reasons = ", ".join(f"{self.left_out[reason]} {reason}" for reason in shown)
        others = self.pairs_left_out - self.left_out[TIE] - self.left_out[CLOSE]
        return (
            f"{self.kept} pairs from {self.prompts - self.left_out.total()} of {self.prompts} prompts, "
            f"mean margin {mean:.4g}"
            + (f", {self.against_score} labels against the score" if self.against_score else "")
            + f"; prompts left out: {reasons}"
            + (f"; {others} more pairs left out as ties or below min_margin" if others else "")
        )

    def _of_pairs(self, mean: float) -> str:
        decided = f", {self.decided} ties decided" if self.decided else ""
        confirmed = self.kept - self.flipped - self.decided
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none"
        return (
            f"{self.kept} of {self.prompts} pairs: {confirmed} as before, {self.flipped} flipped{decided}, "
            f"mean margin {mean:.4g}; left out: {reasons}"
        )


def label_pairs(
    images: Path,
    rewards: Sequence[WeightedReward],
    out: Path,
    settings: LabelSettings,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> LabelCounts:
    """Score sampled images and write preference pairs to `out`; see `label_pictures`.

    Raises:
        UserError: `images` lacks a column or holds nothing, or no pair is left.
    """
    check_sampled(images)
    sampling = read_metadata(images).get("settings", {})
    return label_pictures(
        sampled_pictures(images),
        rewards,
        out,
        settings,
        source=str(images),
        metadata={"sampling": sampling},
        batch_size=batch_size,
        progress=progress,
    )


def label_pictures(
    pictures: Iterable[Picture],
    rewards: Sequence[WeightedReward],
    out: Path,
    settings: LabelSettings,
    *,
    source: str,
    metadata: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> LabelCounts:
    """Score pictures and write preference pairs to `out` with the columns of Pick-a-Pic, plus score_0, score_1.

    The score is the sum of weight x reward (a reward for which lower is better counts negatively), or for `calibrated`
    the mean win rate. The side of each image is random. Everything random depends on (settings.seed, prompt,
    images) alone. The file's metadata records rewards, settings and `metadata`. `progress` is called with the number
    of images newly scored. A prompt with a score that is not finite, or with a picture that cannot be read, is left
    out, and counted. `source` is for messages.

    Raises:
        UserError: no pair is left.
    """
    if not rewards:
        raise UserError("labelling needs at least one reward")
    counts = LabelCounts()
    described = {
        "rewards": [{"name": entry.name, "weight": entry.weight} for entry in rewards],
        "labelling": asdict(settings),
        **(metadata or {}),
    }
    schema, pictures = with_first_frames(PAIR_SCHEMA, pictures)
    with atomic_parquet(out, schema, described) as writer:
        modality = rewards[0].reward.modality
        items = (picture.item() for picture in pictures)
        if settings.mode == "votes":
            stream = score_by_votes(items, rewards, modality=modality)
        else:
            stream = score_items(items, rewards, batch_size=batch_size, modality=modality)
        for _, group in groupby(stream, key=lambda scored: scored.item.extra.group):
            members = list(group)
            parts = [_weighted(scored, rewards, counts) for scored in members]
            _label_prompt([scored.item.extra for scored in members], parts, settings, counts, writer)
            if progress is not None:
                progress(len(members))
        if not counts.kept:
            raise UserError(f"{source}: no pair is left to write ({counts})")
    return counts


def with_first_frames(schema: pa.Schema, pictures: Iterable[Picture]) -> tuple[pa.Schema, Iterable[Picture]]:
    """Return the schema, with a column of first frames where the pictures have one, and the pictures."""
    pictures = iter(pictures)
    ahead = list(islice(pictures, 1))
    if ahead and ahead[0].first_frame is not None:
        schema = schema.append(FIRST_FRAME)
    return schema, chain(ahead, pictures)


def _weighted(scored: Scored, rewards: Sequence[WeightedReward], counts: LabelCounts) -> list[float]:
    """Return weight x reward for each, more is better; nothing where the picture has no score."""
    if scored.error:
        if counts.left_out[UNREADABLE] < SHOWN_FAULTS:
            note(f"{scored.item.name}: {scored.error}; what belongs to it is left out")
        return []
    broken = [(name, value) for name, value in scored.scores.items() if not math.isfinite(value)]
    if broken and NOT_FINITE not in counts.left_out:
        note(
            f"reward '{broken[0][0]}' gave {broken[0][1]} for an {scored.item.name}; "
            "prompts with such a score are left out, and counted at the end"
        )
    return [weighted_total(scored.scores, [entry]) for entry in rewards]


def _label_prompt(
    group: Sequence[Picture],
    parts: Merits,
    settings: LabelSettings,
    counts: LabelCounts,
    writer: RowWriter,
) -> None:
    counts.prompts += 1
    counts.images += len(group)
    counts.relabelled = group[0].pair is not None
    fault = _fault(parts)
    if fault:
        counts.left_out[fault] += 1
        return
    if settings.mode == "calibrated":
        parts = win_rates(parts, settings.temperature)
        scores = [math.fsum(row) / len(row) for row in parts]
    else:
        scores = [sum(row) for row in parts]
    kept_before, reason = counts.kept, TIE
    for better, worse in choose_pairs(scores, parts, group[0].group, settings):
        margin = scores[better] - scores[worse]
        if margin == 0 or margin < settings.min_margin:
            counts.pairs_left_out += 1
            reason = CLOSE if margin else reason
            continue
        name = group[0].pair or content_key(group[better].uid, group[worse].uid)[:16]
        chosen, rejected = (worse, better) if is_upset(margin, name, settings) else (better, worse)
        sides = (chosen, rejected) if uniform(settings.seed, "side", name) < 0.5 else (rejected, chosen)
        writer.add(pair_row([(group[i], scores[i], float(i == chosen)) for i in sides], name))
        counts.kept += 1
        counts.flipped += group[chosen].chosen is False
        counts.decided += counts.relabelled and group[chosen].chosen is None
        counts.against_score += chosen == worse
        counts.margin_sum += scores[chosen] - scores[rejected]
    if counts.kept == kept_before:
        counts.left_out[reason] += 1


def _fault(parts: Merits) -> str:
    """Return why a prompt gives no pair, by the scores of its pictures; empty where it may give some."""
    if not all(parts):
        return UNREADABLE
    if len(parts) < 2:
        return SINGLE
    return "" if all(math.isfinite(part) for row in parts for part in row) else NOT_FINITE


def choose_pairs(scores: Sequence[float], parts: Merits, name: str, settings: LabelSettings) -> list[tuple[int, int]]:
    """Return index pairs (higher score, lower score) of one prompt's images."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if settings.mode in ("best-worst", "votes"):
        pairs = [(order[rank], order[-1 - rank]) for rank in range(len(order) // 2)]
    else:
        pairs = list(combinations(order, 2))
        if settings.mode == "calibrated":
            pairs = [(upper, lower) for upper, lower in frontier_pairs(parts) if scores[upper] > scores[lower]]
        random.Random(derive_seed(settings.seed, "draw", name)).shuffle(pairs)
    return pairs[: settings.pairs_per_prompt]


def is_upset(margin: float, name: str, settings: LabelSettings) -> bool:
    """Tell whether the side of lower score is labelled as preferred."""
    flipped = uniform(settings.seed, "noise", name) < settings.label_noise
    if settings.mode != "bradley-terry":
        return flipped
    upset_probability = 1.0 / (1.0 + math.exp(min(margin / settings.temperature, 700.0)))
    return flipped != (uniform(settings.seed, "preference", name) < upset_probability)


def pair_row(sides: Sequence[tuple[Picture, float, float]], name: str) -> dict[str, Any]:
    """Return the row of a pair: for each side in turn its picture, its score, and 1 where it is the better one."""
    first = sides[0][0].first_frame
    row: dict[str, Any] = {"caption": sides[0][0].prompt, "has_label": True, "ranking_id": name}
    row["first_frame"] = first.read_bytes() if isinstance(first, Path) else first
    for number, (picture, score, label) in enumerate(sides):
        row |= {
            f"jpg_{number}": picture.read(),
            f"label_{number}": label,
            f"score_{number}": score,
            f"image_{number}_uid": picture.uid,
            f"model_{number}": picture.model,
        }
        if label:
            row["best_image_uid"] = picture.uid
    return row
