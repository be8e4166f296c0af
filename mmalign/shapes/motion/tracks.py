"""Tracks of a clip: the things of its frames linked in time, and what each of them did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmalign.shapes.motion.oracle import ClipReading
from mmalign.shapes.oracle import Seen

_REACH = 16.0
"""How far a thing of another kind can be from where a track ended to continue it, in pixels."""
LASTING = 3
"""Frames that a thing is seen in, below which it is a flicker and no thing of the clip."""


@dataclass(frozen=True)
class Track:
    """One thing through the frames of a clip; None where it is not to be seen."""

    things: tuple[Seen | None, ...]

    @cached_property
    def seen(self) -> list[tuple[int, Seen]]:
        """(frame, thing) of the frames that show it."""
        return [(frame, thing) for frame, thing in enumerate(self.things) if thing is not None]

    @property
    def lasts(self) -> bool:
        """Whether it is a thing of the clip, not a flicker."""
        return len(self.seen) >= LASTING

    @cached_property
    def velocity(self) -> tuple[float, float]:
        """Pixels a frame (x right, y down)."""
        return self._slope([t.x for _, t in self.seen]), self._slope([t.y for _, t in self.seen])

    @cached_property
    def growth(self) -> float:
        """Logarithm of the last radius over the first, as if seen in all frames."""
        return (len(self.things) - 1) * self._slope([float(np.log(t.radius)) for _, t in self.seen])

    @cached_property
    def unrest(self) -> float:
        """Largest distance of a place from the middle one, in pixels."""
        places = np.array([(t.x, t.y) for _, t in self.seen])
        return float(np.linalg.norm(places - np.median(places, 0), axis=1).max())

    def forward(self, direction: tuple[float, float, float]) -> float:
        """Share of its steps that go a fifth of the usual one or more along (x, y, log radius)."""
        states = np.array([(t.x, t.y, np.log(t.radius)) for _, t in self.seen]) @ np.array(direction)
        frames = np.array([frame for frame, _ in self.seen])
        least = 0.2 * self._slope(states.tolist())
        return float(np.mean(np.diff(states) / np.diff(frames) > least)) if len(states) > 1 else 0.0

    @property
    def colours(self) -> list[str]:
        """Its colour in the frames that show it."""
        return [thing.colour for _, thing in self.seen]

    def _slope(self, values: list[float]) -> float:
        """The median slope of all pairs of frames (Theil and Sen), which one misread frame does not change."""
        frames = np.array([frame for frame, _ in self.seen], float)
        early, late = np.triu_indices(len(frames), 1)
        slopes = (np.array(values)[late] - np.array(values)[early]) / (frames[late] - frames[early])
        return float(np.median(slopes)) if len(slopes) else 0.0


def modal(values: list[str]) -> tuple[str, float]:
    """The most frequent value, and its share."""
    value, count = Counter(values).most_common(1)[0]
    return value, count / len(values)


def link(clip: ClipReading) -> tuple[Track, ...]:
    """Link things of neighbouring frames: near ones, or ones of the same shape or colour, each to at most one."""
    rows: list[list[Seen | None]] = []
    for number, frame in enumerate(clip):
        last = [next(t for t in reversed(row) if t is not None) for row in rows]
        taken: dict[int, int] = {}
        if last and frame.objects:
            costs = np.array([[_cost(old, new) for new in frame.objects] for old in last])
            taken = {int(c): int(r) for r, c in zip(*linear_sum_assignment(costs), strict=True) if costs[r, c] < 1e3}
        for row in rows:
            row.append(None)
        for column, thing in enumerate(frame.objects):
            if column in taken:
                rows[taken[column]][-1] = thing
            else:
                rows.append([*[None] * number, thing])
    return tuple(Track(tuple(row)) for row in rows)


def _cost(old: Seen, new: Seen) -> float:
    """Distance in units of `_REACH`, and one for another shape or colour; 1000 where the two cannot be the same."""
    strangeness = (old.shape != new.shape) + (old.colour != new.colour)
    distance = float(np.hypot(old.x - new.x, old.y - new.y))
    return 1e3 if strangeness == 2 and distance > _REACH else distance / _REACH + strangeness
