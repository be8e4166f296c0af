"""Truths about a Shapes video, read off its tracks: direction, speed, order and changes.

The same functions read tracks of a scene graph, of re-ordered frames, and of pixels (:mod:`mmalign.shapes.tracking`).
A truth is None if the frames do not show it or contradict each other: a shuffled path has no direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmalign.shapes.video import Track

NUMBERS = ("one", "two", "three")

_STILL, _STEP = 0.12, 0.2
"""Median step and single step, in pixels, below which a shape counts as still; the tracker is exact to about 0.1."""
_EQUAL, _FASTER = 1.2, 1.5
_SAME_RADIUS, _GROWN = 1.12, 1.3


def truth(topic: str, subject: Sequence[str], tracks: Sequence[Track], size: int) -> str | None:
    """The answer to `topic` about the shapes named in `subject`, or None if the tracks show none.

    Values: direction left, right, up, down, still; speed, first, last the name of a shape (speed: or equal); growth
    grows, shrinks, same; recolouring "red to blue" or same; motion straight, bounces, shakes, still; presence always,
    appears, disappears, hides, flashes; colour a colour; shape (its subject is a colour) a shape; count a number word.
    """
    if topic == "count":
        number = sum(any(track) for track in tracks)
        return NUMBERS[number - 1] if 1 <= number <= len(NUMBERS) else None
    if topic == "shape":
        kinds = {s.shape for track in tracks for s in track if s and s.colour == subject[0]}
        return kinds.pop() if len(kinds) == 1 else None
    by_shape = {next(s.shape for s in track if s): track for track in tracks if any(track)}
    if any(shape not in by_shape for shape in subject):
        return None
    if topic == "speed":
        return _faster(subject, by_shape, size)
    if topic in ("first", "last"):
        return _in_order(topic, subject, by_shape)
    return _ALONE[topic](by_shape[subject[0]], size)


def _steps(track: Track, size: int) -> np.ndarray:
    """Displacements `[N, 2]` between neighbouring frames that both show the shape, the short way round."""
    pairs = [(a, b) for a, b in zip(track, track[1:], strict=False) if a and b]
    moved = np.array([(b.x - a.x, b.y - a.y) for a, b in pairs]).reshape(-1, 2)
    return (moved + size / 2) % size - size / 2


def _along(track: Track, size: int) -> tuple[int, np.ndarray] | None:
    """The axis of a path and the steps along it; None if it has none or leaves its axis."""
    steps = _steps(track, size)
    if not len(steps):
        return None
    axis = int(np.abs(steps).sum(0).argmax())
    if np.abs(steps[:, 1 - axis]).max() > max(0.6, 0.5 * np.abs(steps[:, axis]).max()):
        return None
    return axis, steps[:, axis]


def _moves(steps: np.ndarray) -> bool:
    return bool(np.median(np.abs(steps)) > _STILL)


def _direction(track: Track, size: int) -> str | None:
    found = _along(track, size)
    if found is None:
        return None
    axis, steps = found
    if not _moves(steps):
        return "still" if np.abs(steps).max() < 4 * _STEP else None
    if steps.min() < -_STEP and steps.max() > _STEP:
        return None
    return (("left", "right"), ("up", "down"))[axis][int(steps.sum() > 0)]


def _motion(track: Track, size: int) -> str | None:
    found = _along(track, size)
    if found is None:
        return None
    steps = found[1]
    if not _moves(steps):
        return "still" if np.abs(steps).max() < 4 * _STEP else None
    signs = np.sign(steps[np.abs(steps) > _STEP])
    turns = int((signs[1:] != signs[:-1]).sum())
    return {0: "straight", 1: "bounces", 2: None}.get(turns, "shakes")


def _faster(subject: Sequence[str], by_shape: dict[str, Track], size: int) -> str | None:
    paces = [np.linalg.norm(_steps(by_shape[shape], size), axis=1) for shape in subject]
    if not all(len(pace) and _moves(pace) for pace in paces):
        return None
    ratio = float(paces[0].mean() / paces[1].mean())
    if 1 / _EQUAL < ratio < _EQUAL:
        return "equal"
    if 1 / _FASTER < ratio < _FASTER:
        return None
    return subject[0] if ratio > 1 else subject[1]


def _in_order(topic: str, subject: Sequence[str], by_shape: dict[str, Track]) -> str | None:
    """Who is shown first (last), of shapes that are each shown once and never two at a time."""
    spans = {}
    for shape in subject:
        frames = [index for index, seen in enumerate(by_shape[shape]) if seen]
        if frames[-1] - frames[0] + 1 != len(frames):
            return None
        spans[shape] = (frames[0], frames[-1])
    ordered = sorted(subject, key=lambda shape: spans[shape])
    if any(spans[a][1] >= spans[b][0] for a, b in zip(ordered, ordered[1:], strict=False)):
        return None
    return ordered[0] if topic == "first" else ordered[-1]


def _growth(track: Track, size: int) -> str | None:
    radii = np.array([s.radius for s in track if s])
    if radii.max() < _SAME_RADIUS * radii.min():
        return "same"
    steps, total = np.diff(radii), radii[-1] / radii[0]
    if total > _GROWN and steps.min() > -0.5:
        return "grows"
    return "shrinks" if total < 1 / _GROWN and steps.max() < 0.5 else None


def _recolouring(track: Track, size: int) -> str | None:
    colours = [s.colour for s in track if s]
    runs = [colours[0]] + [b for a, b in zip(colours, colours[1:], strict=False) if a != b]
    return {1: "same", 2: " to ".join(runs)}.get(len(runs))


def _presence(track: Track, size: int) -> str | None:
    seen = [bool(s) for s in track]
    runs = [seen[0]] + [b for a, b in zip(seen, seen[1:], strict=False) if a != b]
    return _RUNS.get(tuple(runs))


_RUNS = {
    (True,): "always",
    (False, True): "appears",
    (True, False): "disappears",
    (True, False, True): "hides",
    (False, True, False): "flashes",
}


def _colour(track: Track, size: int) -> str | None:
    colours = {s.colour for s in track if s}
    return colours.pop() if len(colours) == 1 else None


_ALONE: dict[str, Callable[[Track, int], str | None]] = {
    "direction": _direction, "growth": _growth, "recolouring": _recolouring,
    "motion": _motion, "presence": _presence, "colour": _colour,
}  # fmt: skip
