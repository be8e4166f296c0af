"""Label the segments of pairs of videos apart by a reward, as DenseDPO does (arXiv 2506.03517).

Two videos that share their motion seldom differ alike all the time: one wins the first second, the other the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key, uniform
from mmalign.core.io.decode import decode_video
from mmalign.core.io.items import Item, Slice, bytes_or_file
from mmalign.core.io.parquet import RowWriter, atomic_parquet
from mmalign.core.progress import note
from mmalign.scoring.choice import WeightedReward, weighted_total
from mmalign.scoring.engine import decode_beside, score_group
from mmalign.scoring.labelling import (
    NOT_FINITE,
    PAIR_SCHEMA,
    SHOWN_FAULTS,
    SINGLE,
    TIE,
    UNREADABLE,
    LabelSettings,
    choose_pairs,
    is_upset,
    pair_row,
    with_first_frames,
)
from mmalign.scoring.pictures import Picture
from rewards import reward_class

LABEL = pa.struct([("start", pa.float64()), ("end", pa.float64()), ("label", pa.int8())])
SEGMENT_SCHEMA = pa.schema([*PAIR_SCHEMA, pa.field("segments", pa.list_(LABEL))])
"""Labels are 1 where the video of ``jpg_0`` is better, -1 where that of ``jpg_1`` is, 0 for a tie."""
UNEQUAL = "with videos of different lengths"
AHEAD = 8
"""Videos decoded in advance."""


class Span(NamedTuple):
    """A segment of a video: from `start` to before `end` in seconds, its frames from `first` to before `last`."""

    start: float
    end: float
    first: int
    last: int


def cut_spans(frames: int, rate: float | None, seconds: float) -> list[Span]:
    """Return the segments of a video of so many frames at `rate` a second, each `seconds` long.

    A rest shorter than half a segment belongs to the one before it, a longer one is a segment of its own.

    >>> [(span.start, span.end, span.first, span.last) for span in cut_spans(9, 4.0, 1.0)]
    [(0.0, 1.0, 0, 4), (1.0, 2.25, 4, 9)]

    Raises:
        UserError: a segment would hold no frame, or the rate is not known.
    """
    if not rate:
        raise UserError("the frames have no rate, so nothing tells their seconds; give video files that state it")
    count = max(1, math.floor(frames / rate / seconds + 0.5))
    firsts = [math.ceil(index * seconds * rate - 1e-6) for index in range(count)] + [frames]
    times = [index * seconds for index in range(count)] + [frames / rate]
    spans = [Span(times[i], times[i + 1], firsts[i], firsts[i + 1]) for i in range(count)]
    if any(span.last <= span.first for span in spans):
        raise UserError(f"segments of {seconds:g} s hold less than a frame at {rate:g} a second")
    return spans


def check_segments(first: Picture, settings: LabelSettings, names: Sequence[str], seconds: float) -> None:
    """Refuse settings and rewards that cannot label segments of the first video, before a reward is loaded.

    Raises:
        UserError: the mode is ``calibrated``; a reward judges images, or needs more frames than a segment has; or the
            video has no rate.
    """
    if settings.mode == "calibrated":
        raise UserError("--mode calibrated compares whole videos; with --segments take best-worst or bradley-terry")
    for name in names:
        if reward_class(name).modality != "video":
            raise UserError(f"--segments are parts of videos, and reward '{name}' judges images; choose another")
    try:
        levels, rate = decode_video(first.media if isinstance(first.media, Path) else first.read())
    except Exception:  # an unreadable video is named and counted when its turn comes
        return
    spans = cut_spans(len(levels), rate, seconds)
    if len(spans) == 1:
        note(f"--segments {seconds:g}: the first video lasts {spans[0].end:g} s, so it is one segment")
    frames = min(span.last - span.first for span in spans)
    for name in names:
        least = reward_class(name).least_frames
        if frames < least:
            raise UserError(
                f"--segments {seconds:g}: a segment has {frames} of {len(levels)} frames, and reward '{name}' needs "
                f"at least {least}; give longer segments"
            )


@dataclass
class SegmentCounts:
    """Counts of prompts, pairs and segments; `mixed` pairs have segments won by either side."""

    prompts: int = 0
    kept: int = 0
    mixed: int = 0
    segments: Counter[str] = field(default_factory=Counter)
    """winner of a segment: chosen, rejected or tie"""
    left_out: Counter[str] = field(default_factory=Counter)
    """reason -> prompts that gave no pair"""
    against_score: int = 0

    def __str__(self) -> str:
        """Return the counts as one line."""
        share = 100 * self.mixed / self.kept if self.kept else 0.0
        won = ", ".join(f"{self.segments[name]} {name}" for name in ("chosen", "rejected", "tie"))
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none"
        return (
            f"{self.kept} pairs from {self.prompts - self.left_out.total()} of {self.prompts} prompts; {self.mixed} "
            f"({share:.0f} %) have winning and losing segments; segments: {won}"
            + (f", {self.against_score} labels against the score" if self.against_score else "")
            + f"; prompts left out: {reasons}"
        )


class ScoredSegments(NamedTuple):
    """A video with the weighted score of each segment, more is better; or the error."""

    picture: Picture
    spans: list[Span]
    totals: list[float]
    error: str = ""

    @property
    def mean(self) -> float:
        """The score of the video."""
        return math.fsum(self.totals) / len(self.totals)


def label_segments(
    pictures: Iterable[Picture],
    rewards: Sequence[WeightedReward],
    out: Path,
    settings: LabelSettings,
    seconds: float,
    *,
    source: str,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> SegmentCounts:
    """Score segments of videos apart and write pairs with their labels to `out`, in `SEGMENT_SCHEMA`.

    A video's score is the mean over its segments; it makes the pairs of a prompt as `label_pictures` does and tells
    chosen from rejected. A segment is a tie where both sides score the same, or closer than `settings.min_margin`;
    a pair is left out where all are. Draws of ``bradley-terry`` and `settings.label_noise` flip segments one by one.
    `source` is for messages.

    Raises:
        UserError: no pair is left.
    """
    counts = SegmentCounts()
    described = {
        "rewards": [{"name": entry.name, "weight": entry.weight} for entry in rewards],
        "labelling": asdict(settings),
        "segments": seconds,
        **(metadata or {}),
    }
    schema, pictures = with_first_frames(SEGMENT_SCHEMA, pictures)
    with atomic_parquet(out, schema, described) as writer:
        stream = score_segments((picture.item() for picture in pictures), rewards, seconds)
        for _, group in groupby(stream, key=lambda scored: scored.picture.group):
            members = list(group)
            _label_prompt(members, settings, counts, writer)
            if progress is not None:
                progress(len(members))
        if not counts.kept:
            raise UserError(f"{source}: no pair is left to write ({counts})")
    return counts


def score_segments(
    items: Iterable[Item], rewards: Sequence[WeightedReward], seconds: float
) -> Iterator[ScoredSegments]:
    """Yield each video with the scores of its segments, in order; each file is decoded once."""
    for item, decoded in decode_beside(rewards, items, "video", AHEAD, partial(_read, seconds)):
        if isinstance(decoded, str):
            yield ScoredSegments(item.extra, [], [], decoded)
            continue
        levels, spans = decoded
        totals, error = _totals(item, levels, spans, rewards)
        yield ScoredSegments(item.extra, spans, totals, error)


def _read(seconds: float, media: bytes | Path | Slice) -> tuple[Tensor, list[Span]]:
    levels, rate = decode_video(bytes_or_file(media))
    return levels, cut_spans(len(levels), rate, seconds)


def _totals(
    item: Item, levels: Tensor, spans: Sequence[Span], rewards: Sequence[WeightedReward]
) -> tuple[list[float], str]:
    """Return the weighted score of each segment, those of one length scored together; or none, and the error."""
    totals: dict[int, float] = {}
    lengths = [span.last - span.first for span in spans]
    for length in sorted(set(lengths)):
        places = [place for place, own in enumerate(lengths) if own == length]
        parts = torch.stack([levels[spans[place].first : spans[place].last] for place in places])
        for place, scored in zip(places, score_group([item] * len(places), parts, rewards), strict=True):
            if scored.error:
                return [], scored.error
            totals[place] = weighted_total(scored.scores, rewards)
    return [totals[place] for place in range(len(spans))], ""


def _label_prompt(
    group: Sequence[ScoredSegments], settings: LabelSettings, counts: SegmentCounts, writer: RowWriter
) -> None:
    counts.prompts += 1
    if fault := _fault(group, counts):
        counts.left_out[fault] += 1
        return
    scores = [one.mean for one in group]
    kept_before = counts.kept
    for better, worse in choose_pairs(scores, [[score] for score in scores], group[0].picture.group, settings):
        _label_pair((group[better], group[worse]), settings, counts, writer)
    if counts.kept == kept_before:
        counts.left_out[TIE] += 1


def _fault(group: Sequence[ScoredSegments], counts: SegmentCounts) -> str:
    """Return why a prompt gives no pair; empty where it may give some."""
    for one in group:
        if one.error:
            if counts.left_out[UNREADABLE] < SHOWN_FAULTS:
                note(f"{one.picture.item().name}: {one.error}; what belongs to it is left out")
            return UNREADABLE
    if len(group) < 2:
        return SINGLE
    if any(one.spans != group[0].spans for one in group):
        return UNEQUAL
    return "" if all(math.isfinite(total) for one in group for total in one.totals) else NOT_FINITE


def _label_pair(
    pair: tuple[ScoredSegments, ScoredSegments], settings: LabelSettings, counts: SegmentCounts, writer: RowWriter
) -> None:
    """Write a pair, the better side first in `pair`, unless all its segments are ties."""
    better, worse = pair
    name = better.picture.pair or content_key(better.picture.uid, worse.picture.uid)[:16]
    labels = []
    for place, (own, other) in enumerate(zip(better.totals, worse.totals, strict=True)):
        margin = abs(own - other)
        tie = margin == 0 or margin < settings.min_margin
        upset = not tie and is_upset(margin, f"{name}/{place}", settings)
        labels.append(0 if tie else 1 if (own > other) != upset else -1)
        counts.against_score += upset
    if not any(labels):
        return
    turned = uniform(settings.seed, "side", name) >= 0.5
    sides = [(one.picture, one.mean, float(one is better)) for one in (pair[::-1] if turned else pair)]
    segments = [
        {"start": span.start, "end": span.end, "label": -label if turned else label}
        for span, label in zip(better.spans, labels, strict=True)
    ]
    writer.add({**pair_row(sides, name), "segments": segments})
    counts.kept += 1
    counts.mixed += {1, -1} <= set(labels)
    counts.segments.update({1: "chosen", -1: "rejected", 0: "tie"}[label] for label in labels)
