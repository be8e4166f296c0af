"""Clips of moving Shapes: nine frames of 64x64 pixels in which one or two shapes each do one thing.

A :class:`Clip` is the scene graph; :func:`frames_of` unrolls it into the objects of every frame and :func:`render`
draws them with the drawing of :mod:`mmalign.shapes.world`. There are walls: a shape stays whole inside the frame
and never touches another one, so that a picture at any time is one of the image world.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mmalign.shapes.video import DIRECTIONS
from mmalign.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_OBJECTS,
    RADII,
    SHAPES,
    SIZE,
    Object,
    Scene,
    inside,
    random_kind,
)
from mmalign.shapes.world import render as draw

FRAMES, FPS = 9, 8
"""Frames of a clip, and how many of them are shown a second."""

EVENTS = ("recolour", "appear", "disappear")
"""Motions that happen at one frame; two of them can be put in order."""
MOTIONS = (*DIRECTIONS, "grow", "shrink", *EVENTS, "still")
SPEEDS = {"slow": (7.0, 12.0), "fast": (24.0, 32.0)}
"""Range of the whole way of each speed, in pixels."""

HELD_OUT_MOTIONS = frozenset(
    {
        ("star", "left"),
        ("ring", "down"),
        ("circle", "up"),
        ("cross", "grow"),
        ("triangle", "recolour"),
        ("square", "disappear"),
    }
)
"""(shape, motion) combinations in no training clip; the prompts of category `Conflicting` ask for them."""

_RADIUS_BEFORE, _RADIUS_AFTER = (7.0, 8.5), (12.5, 14.0)
_GAP = 3.0
_WEIGHTS = {
    "left": 0.12, "right": 0.12, "up": 0.12, "down": 0.12, "grow": 0.09, "shrink": 0.09, "recolour": 0.1,
    "appear": 0.08, "disappear": 0.08, "still": 0.08,
}  # fmt: skip


@dataclass(frozen=True)
class Mover:
    """One shape and what it does: `thing` is the shape before it does so (where it will be, if it appears).

    way: pixels from the first to the last frame along a direction, at the named `speed`. end_radius, end_colour: those
    of the last frame. at: the first frame in which an event has happened.
    """

    thing: Object
    motion: str
    speed: str | None = None
    way: float = 0.0
    end_radius: float | None = None
    end_colour: str | None = None
    at: int = 0

    def seen(self, frame: int) -> Object | None:
        """The shape as it is in one frame; None where it is not to be seen."""
        if (self.motion == "appear" and frame < self.at) or (self.motion == "disappear" and frame >= self.at):
            return None
        share, thing = frame / (FRAMES - 1), self.thing
        if self.motion in DIRECTIONS:
            dx, dy = DIRECTIONS[self.motion]
            return replace(thing, x=thing.x + dx * self.way * share, y=thing.y + dy * self.way * share)
        if self.end_radius is not None:
            return replace(thing, radius=thing.radius + (self.end_radius - thing.radius) * share)
        if self.end_colour is not None and frame >= self.at:
            return replace(thing, colour=self.end_colour)
        return thing


@dataclass(frozen=True)
class Clip:
    """The scene graph of a clip. `ordered`: the event of the second mover comes after that of the first."""

    movers: tuple[Mover, ...]
    background: str
    ordered: bool = False


def frames_of(clip: Clip) -> tuple[tuple[Object, ...], ...]:
    """The objects of every frame, in the order of the movers."""
    return tuple(
        tuple(thing for mover in clip.movers if (thing := mover.seen(frame)) is not None) for frame in range(FRAMES)
    )


def render(clip: Clip) -> UInt8[Tensor, "9 3 64 64"]:
    """Draw a clip; the same clip always gives the same bytes. Divide by 255 for what rewards and models take."""
    pictures = np.stack([draw(Scene(objects, clip.background)) for objects in frames_of(clip)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def is_held_out(clip: Clip) -> bool:
    """Whether the clip shows a combination kept out of every training set."""
    for mover in clip.movers:
        shape, colours = mover.thing.shape, (mover.thing.colour, mover.end_colour)
        if (shape, mover.motion) in HELD_OUT_MOTIONS or any((c, shape) in HELD_OUT_OBJECTS for c in colours):
            return True
    return False


def sample_clip(rng: np.random.Generator, *, held_out: bool = False) -> Clip:
    """Draw a random clip; without `held_out` it shows no held-out combination (training data)."""
    while True:
        clip = _compose(rng)
        if clip is not None and (held_out or not is_held_out(clip)):
            return clip


def _compose(rng: np.random.Generator) -> Clip | None:
    kind = rng.random()
    number, ordered = (1, False) if kind < 0.6 else (2, kind > 0.92)
    motions = [str(m) for m in (rng.choice(EVENTS, number) if ordered else _random_motions(rng, number))]
    shapes, colours = rng.permutation(SHAPES), rng.permutation(list(COLOURS))
    moments = (int(rng.integers(2, 4)), int(rng.integers(5, 7))) if ordered else rng.integers(3, 6, number)
    movers = [
        _mover(rng, str(shapes[k]), str(colours[k]), str(colours[-1 - k]), motion, int(moments[k]))
        for k, motion in enumerate(motions)
    ]
    clip = Clip(tuple(movers), str(rng.choice(list(BACKGROUNDS))), ordered)
    return clip if _has_room(clip) else None


def _random_motions(rng: np.random.Generator, number: int) -> list[str]:
    return [str(m) for m in rng.choice(list(_WEIGHTS), number, p=list(_WEIGHTS.values()))]


def _mover(rng: np.random.Generator, shape: str, colour: str, other: str, motion: str, at: int) -> Mover:
    size = random_kind(rng)[2]
    radius, end_radius, way, speed = float(rng.uniform(*RADII[size])), None, 0.0, None
    if motion in ("grow", "shrink"):
        before, after = float(rng.uniform(*_RADIUS_BEFORE)), float(rng.uniform(*_RADIUS_AFTER))
        radius, end_radius = (before, after) if motion == "grow" else (after, before)
        size = "small" if motion == "grow" else "large"
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    if motion in DIRECTIONS:
        speed = str(rng.choice(list(SPEEDS)))
        way = float(rng.uniform(*SPEEDS[speed]))
    reach = 1.0 + 1.1 * max(radius, end_radius or 0.0)
    low, high = reach, SIZE - reach
    x = float(rng.uniform(low - min(dx * way, 0.0), high - max(dx * way, 0.0)))
    y = float(rng.uniform(low - min(dy * way, 0.0), high - max(dy * way, 0.0)))
    return Mover(
        Object(shape, colour, size, x, y, radius), motion, speed, way, end_radius,
        other if motion == "recolour" else None, at if motion in EVENTS else 0,
    )  # fmt: skip


def _has_room(clip: Clip) -> bool:
    """Whether every shape is inside the frame and clear of the other one, all the time."""
    for frame in range(FRAMES):
        things = [mover.seen(frame) or mover.thing for mover in clip.movers]
        if not all(inside(thing) for thing in things):
            return False
        if len(things) == 2:
            a, b = things
            if np.hypot(a.x - b.x, a.y - b.y) <= 1.06 * (a.radius + b.radius) + _GAP:
                return False
    return True
