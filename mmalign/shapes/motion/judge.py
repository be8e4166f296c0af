"""Grades of a clip against its prompt: things, motion, smoothness; and how much it moves at all.

All are in [0, 1] but :func:`dynamic_degree`, and are computed from what the oracle reads in the frames. The borders
are those of the world (:mod:`mmalign.shapes.motion.world`) with a margin, so that each drawn clip has full marks for
its captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmalign.shapes.language import Group, Query
from mmalign.shapes.motion.language import Action, MotionQuery
from mmalign.shapes.motion.oracle import ClipReading
from mmalign.shapes.motion.tracks import Track, link, modal
from mmalign.shapes.motion.world import EVENTS
from mmalign.shapes.oracle import Reading, Seen, judge, match_share
from mmalign.shapes.video import DIRECTIONS

BEFORE, AFTER = 2, 3
"""Frames at the beginning in which no event has happened yet, and at the end in which every event has."""


_MOSTLY = (0.5, 0.88)
"""Shares of frames that count nothing, and fully: one of nine may be misread."""


def _ramp(value: float, nothing: float, full: float) -> float:
    """0 at `nothing`, 1 at `full`, linear in between."""
    return float(np.clip((value - nothing) / (full - nothing), 0.0, 1.0))


# -------------------------------------------------------------------------------------------------- things


def correctness(query: MotionQuery, clip: ClipReading) -> float:
    """How well the frames show the things of the prompt, whatever they do: the mean over frames of the image grade.

    A thing that changes colour may have either colour, and one that appears or disappears has to be there in the
    last three or the first two frames alone.
    """
    return float(np.mean([_frame_grade(query, frame, number, len(clip)) for number, frame in enumerate(clip)]))


def _frame_grade(query: MotionQuery, frame: Reading, number: int, frames: int) -> float:
    choices = [_allowed(action, number, frames) for action in query.actions]
    grades = []
    for groups in product(*choices):
        wanted = tuple(group for group in groups if group is not None)
        if wanted:
            grades.append(judge(Query(wanted, (), query.background), frame))
        else:
            grades.append(float(not frame.objects and query.background in (None, frame.background)))
    return max(grades)


def _allowed(action: Action, number: int, frames: int) -> list[Group | None]:
    """What may be seen of an action in a frame; None: nothing."""
    groups: list[Group | None] = [action.group]
    if action.motion == "recolour":
        groups.append(replace(action.group, colour=action.colour))
    late, early = number >= frames - AFTER, number < BEFORE
    if (action.motion == "appear" and not late) or (action.motion == "disappear" and not early):
        groups.append(None)
    return groups


# -------------------------------------------------------------------------------------------------- motion


def motion(query: MotionQuery, clip: ClipReading) -> float:
    """How well the things do what the prompt says: the mean over its actions, halved where the order is wrong.

    An action counts for a thing that has the shape or the colour (half of what is named) most of the time.
    """
    grades, tracks, _ = _assigned(query, clip)
    return float(np.mean(grades)) * (1.0 if _in_order(query, tracks) else 0.5)


def is_strict(query: MotionQuery, clip: ClipReading) -> bool:
    """Whether the clip shows exactly the things of the prompt, each doing exactly what it should."""
    grades, tracks, matches = _assigned(query, clip)
    lasting = sum(track.lasts for track in link(clip))
    right = min(grades) > 1.0 - 1e-6 and min(matches) >= 0.75 and _in_order(query, tracks)
    background = query.background is None or modal([frame.background for frame in clip])[0] == query.background
    return bool(right and lasting == len(query.actions) and background)


def _assigned(query: MotionQuery, clip: ClipReading) -> tuple[list[float], list[Track | None], list[float]]:
    """Grade, track and share of attributes of every action, by the assignment of tracks with the best match."""
    tracks = [track for track in link(clip) if track.lasts]
    grades = [0.0] * len(query.actions)
    chosen: list[Track | None] = [None] * len(query.actions)
    shares = [0.0] * len(query.actions)
    if tracks:
        matches = np.array([[_share(action, track) for track in tracks] for action in query.actions])
        doing = np.array([[grade(action, track) for track in tracks] for action in query.actions])
        for row, column in zip(*linear_sum_assignment(-matches - 0.05 * doing), strict=True):
            if matches[row, column] >= 0.45:
                grades[row], chosen[row] = float(doing[row, column]), tracks[column]
                shares[row] = float(matches[row, column])
    return grades, chosen, shares


def _share(action: Action, track: Track) -> float:
    """Share of the named attributes that a track has, in the mean over the frames that show it."""
    choices = [g for g in _allowed(action, 0, 1) if g is not None]
    return float(np.mean([max(match_share(group, thing) for group in choices) for _, thing in track.seen]))


def grade(action: Action, track: Track) -> float:
    """How well one track does what an action says: what is asked happens, and nothing else does."""
    asked = _ASKED[action.motion](action, track) if action.motion in _ASKED else _moved(action, track)
    return asked * (0.4 + 0.6 * _kept(action, track))


def _moved(action: Action, track: Track) -> float:
    """Progress along the direction in most steps, not across it, at the right speed."""
    direction = np.array(DIRECTIONS[action.motion])
    velocity = np.array(track.velocity)
    pace = float(velocity @ direction)
    if pace <= 0.15:
        return 0.0
    across = float(np.abs(velocity - pace * direction).max())
    way = _ramp(pace, 0.15, 0.65) * _ramp(across, pace, 0.4 * pace) * _steadily(track, (*direction, 0.0))
    if action.speed is None:
        return way
    return way * (0.5 + 0.5 * (_ramp(pace, 1.9, 2.5) if action.speed == "fast" else _ramp(pace, 2.6, 2.0)))


def _grown(action: Action, track: Track) -> float:
    sign = 1.0 if action.motion == "grow" else -1.0
    return _ramp(sign * track.growth, 0.06, 0.3) * _steadily(track, (0.0, 0.0, sign))


def _steadily(track: Track, direction: tuple[float, float, float]) -> float:
    """Whether most steps go forward: two of eight may not."""
    return _ramp(track.forward(direction), 0.4, 0.75)


def _recoloured(action: Action, track: Track) -> float:
    """The right colour after another one, or the one that is named; a third for another change of colour."""
    colours = [thing.colour if thing else None for thing in track.things]
    first = [colour for colour in colours[:BEFORE] if colour is not None]
    start = action.group.colour
    before = np.mean([c == start if start else c != action.colour for c in first]) if first else 0.0
    after = np.mean([colour == action.colour for colour in colours[-AFTER:]])
    changed = modal(track.colours[:BEFORE])[0] != modal(track.colours[-AFTER:])[0]
    return max(float(before * after), float(changed) / 3)


def _appeared(action: Action, track: Track) -> float:
    absent = [thing is None for thing in track.things]
    if action.motion == "disappear":
        return float((1 - np.mean(absent[:BEFORE])) * np.mean(absent[-AFTER:]))
    return float(np.mean(absent[:BEFORE]) * (1 - np.mean(absent[-AFTER:])))


_ASKED = {
    "grow": _grown, "shrink": _grown, "recolour": _recoloured, "appear": _appeared, "disappear": _appeared,
    "still": lambda action, track: _stays(track),
}  # fmt: skip


def _stays(track: Track) -> float:
    """Whether it stays where it is."""
    return _ramp(float(np.hypot(*track.velocity)), 0.7, 0.25) * _ramp(track.unrest, 6.0, 2.5)


def _kept(action: Action, track: Track) -> float:
    """Whether what is not to change stays: place, size, colour, and that it is to be seen."""
    kept = 1.0
    if action.motion not in DIRECTIONS:
        kept *= _stays(track)
    if action.motion not in ("grow", "shrink"):
        kept *= _ramp(abs(track.growth), 0.4, 0.2)
    if action.motion != "recolour":
        kept *= _ramp(modal(track.colours)[1], *_MOSTLY)
    if action.motion not in ("appear", "disappear"):
        kept *= _ramp(len(track.seen) / len(track.things), *_MOSTLY)
    return kept


def _in_order(query: MotionQuery, tracks: Sequence[Track | None]) -> bool:
    """Whether the last event comes after the first, if the prompt says so."""
    if not query.ordered:
        return True
    times = [_time(action, track) for action, track in zip(query.actions, tracks, strict=True)]
    return times[0] is not None and times[-1] is not None and times[0] < times[-1]


def _time(action: Action, track: Track | None) -> int | None:
    """The first frame in which an event has happened."""
    if track is None or action.motion not in EVENTS:
        return None
    if action.motion == "disappear":
        return track.seen[-1][0] + 1
    return next((f for f, t in track.seen if action.motion == "appear" or t.colour == action.colour), None)


# -------------------------------------------------------------------------------------------------- smoothness


def smoothness(query: MotionQuery, clip: ClipReading) -> float:
    """Whether nothing jumps between frames but what the prompt asks for: shape, colour, place, size, presence.

    The mean over things and pairs of neighbouring frames; a thing that is there in one of the two alone counts as 0,
    unless it is asked to appear or to disappear. An empty clip is 0.
    """
    tracks = link(clip)
    recolours = sum(a.motion == "recolour" for a in query.actions)
    presences = sum(a.motion in ("appear", "disappear") for a in query.actions)
    grades: list[float] = []
    for track in tracks:
        for number, (old, new) in enumerate(zip(track.things, track.things[1:], strict=False)):
            if old is None and new is None:
                continue
            if old is None or new is None:
                presences -= 1
                grades += [0.0] if presences < 0 else []
                continue
            recolours -= old.colour != new.colour
            same = old.colour == new.colour or recolours >= 0
            before = track.things[number - 1] if number else None
            grades.append(((old.shape == new.shape) + same + _steady(before, old, new)) / 3)
    return float(np.mean(grades)) if grades else 0.0


def _steady(before: Seen | None, old: Seen, new: Seen) -> float:
    """Whether place and radius go on as they did, within a pixel and a tenth of the radius."""
    if before is None:
        return 1.0
    jump = float(np.hypot(new.x - 2 * old.x + before.x, new.y - 2 * old.y + before.y))
    swell = abs(new.radius - 2 * old.radius + before.radius) / old.radius
    return _ramp(jump, 5.0, 1.2) * _ramp(swell, 0.4, 0.12)


# -------------------------------------------------------------------------------------------------- how much moves


def dynamic_degree(clip: ClipReading) -> float:
    """Change a frame, in pixels, whatever the prompt: the sum over things of their speeds and growth.

    A thing that ends in another colour than it began in, or is there in the first or the last frame alone, counts
    one pixel a frame more. Flickering counts nothing.
    """
    return sum((_change(track) for track in link(clip) if track.lasts), 0.0)


def _change(track: Track) -> float:
    first, last = track.seen[0][1].radius, track.seen[-1][1].radius
    growth = abs(track.growth) / (len(track.things) - 1) * (first + last) / 2
    recoloured = modal(track.colours[:BEFORE])[0] != modal(track.colours[-AFTER:])[0]
    gone = (track.things[0] is None) != (track.things[-1] is None)
    return float(np.hypot(*track.velocity)) + growth + recoloured + gone
