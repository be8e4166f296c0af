"""Videos of the Shapes world: one to three coloured shapes that move, grow, change colour, appear or hide.

A :class:`VideoScene` is the scene graph; :func:`unroll` turns it into tracks (every shape and its place, frame by
frame), :func:`draw` turns tracks into pixels with the drawing of :mod:`mmalign.shapes.world`. All truths are read off
tracks (:mod:`mmalign.shapes.facts`), so re-ordering a video and re-ordering its tracks can be compared.

The frame wraps around: a shape that leaves at one edge comes in at the opposite one. A place in any frame is therefore
independent of a shape's direction and speed, unlike in a frame with walls. Places, radii and
speeds are multiples of 1/64 px, so a scene and its reverse are drawn with the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mmalign.shapes.world import BACKGROUNDS, COLOURS, coverage

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
MANNERS = ("straight", "bounces", "shakes")
MIN_FRAMES, MAX_FRAMES = 8, 16
MIN_SIZE, MAX_SIZE = 32, 48
GRID = 64
"""Steps a pixel that lengths are rounded to."""


@dataclass(frozen=True)
class Actor:
    """One shape and its motion.

    x, y: centre in the first frame, in pixels (x right, y down). speed: pixels a frame along `direction`, which the
    actor follows `straight`, until it `bounces` back half-way, or to and fro a step at a time when it `shakes`.
    end_radius: radius in the last frame, reached evenly. end_colour: its colour from frame `switch` on. shown: the
    half-open intervals of frames in which it is to be seen; None for all.
    """

    shape: str
    colour: str
    radius: float
    x: float
    y: float
    direction: str = "right"
    speed: float = 0.0
    manner: str = "straight"
    end_radius: float | None = None
    end_colour: str | None = None
    switch: int = 0
    shown: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class VideoScene:
    """The scene graph of a video: later actors are drawn over earlier ones; `size` is the side in pixels."""

    actors: tuple[Actor, ...]
    background: str
    frames: int
    size: int

    def __post_init__(self) -> None:
        """Refuse lengths, sizes and numbers of actors that are not of this world."""
        if not MIN_FRAMES <= self.frames <= MAX_FRAMES:
            raise ValueError(f"a Shapes video has {MIN_FRAMES} to {MAX_FRAMES} frames, not {self.frames}")
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"a Shapes video is {MIN_SIZE} to {MAX_SIZE} pixels wide, not {self.size}")
        if not 1 <= len(self.actors) <= 3:
            raise ValueError(f"a Shapes video has one to three actors, not {len(self.actors)}")


@dataclass(frozen=True)
class Sighting:
    """One shape in one frame: its kind, colour, centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


Track = tuple[Sighting | None, ...]
"""One shape through the frames of a video; None where it is not to be seen."""


def snap(length: float) -> float:
    """Round a length to the grid on which sums are exact."""
    return float(np.floor(length * GRID + 0.5 + 1e-6)) / GRID


def steps_along(manner: str, frames: int) -> list[int]:
    """How many steps along its direction an actor has come in each frame.

    Raises:
        ValueError: no such manner.
    """
    if manner == "straight":
        return list(range(frames))
    if manner == "bounces":
        return [min(frame, frames - 1 - frame) for frame in range(frames)]
    if manner == "shakes":
        return [frame % 2 for frame in range(frames)]
    raise ValueError(f"no manner {manner!r}; there are {', '.join(MANNERS)}")


def unroll(scene: VideoScene) -> tuple[Track, ...]:
    """The track of every actor, in the order of the scene."""
    return tuple(_track(actor, scene) for actor in scene.actors)


def _track(actor: Actor, scene: VideoScene) -> Track:
    along, (dx, dy) = steps_along(actor.manner, scene.frames), DIRECTIONS[actor.direction]
    growth = 0.0 if actor.end_radius is None else actor.end_radius - actor.radius
    sightings: list[Sighting | None] = []
    for frame in range(scene.frames):
        if actor.shown is not None and not any(first <= frame < last for first, last in actor.shown):
            sightings.append(None)
            continue
        changed = actor.end_colour is not None and frame >= actor.switch
        way = along[frame] * actor.speed
        sightings.append(
            Sighting(
                actor.shape,
                str(actor.end_colour) if changed else actor.colour,
                (actor.x + dx * way) % scene.size,
                (actor.y + dy * way) % scene.size,
                snap(actor.radius + growth * frame / (scene.frames - 1)),
            )
        )
    return tuple(sightings)


def reverse(scene: VideoScene) -> VideoScene:
    """The scene that shows the same frames in the opposite order."""
    return replace(scene, actors=tuple(_backwards(actor, scene) for actor in scene.actors))


def _backwards(actor: Actor, scene: VideoScene) -> Actor:
    along, (dx, dy) = steps_along(actor.manner, scene.frames), DIRECTIONS[actor.direction]
    turn = along[-1] != 0
    x = (actor.x + dx * along[-1] * actor.speed) % scene.size
    y = (actor.y + dy * along[-1] * actor.speed) % scene.size
    shown = actor.shown and tuple((scene.frames - last, scene.frames - first) for first, last in reversed(actor.shown))
    changed = replace(actor, x=x, y=y, shown=shown)
    if turn:
        changed = replace(changed, direction=OPPOSITE[actor.direction])
    if actor.end_radius is not None:
        changed = replace(changed, radius=actor.end_radius, end_radius=actor.radius)
    if actor.end_colour is not None:
        switch = scene.frames - actor.switch
        changed = replace(changed, colour=actor.end_colour, end_colour=actor.colour, switch=switch)
    return changed


def draw(tracks: Sequence[Track], background: str, size: int) -> UInt8[Tensor, "frames 3 size size"]:
    """Draw tracks of equal length, later ones over earlier ones; the same tracks always give the same bytes."""
    frames = [_draw_frame([s for s in moment if s], background, size) for moment in zip(*tracks, strict=True)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def _draw_frame(sightings: Sequence[Sighting], background: str, size: int) -> np.ndarray:
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    for thing in sightings:
        alpha = _wrapped_coverage(thing, size)[..., None]
        image += alpha * (np.asarray(COLOURS[thing.colour], np.float32) - image)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _wrapped_coverage(thing: Sighting, size: int) -> np.ndarray:
    """Coverage of a shape and of its copies that reach in from beyond the edges."""
    reach = 1.1 * thing.radius + 1.0
    xs, ys = ([at + turn * size for turn in (0, -1, 1) if -reach < at + turn * size < size + reach]
              for at in (thing.x, thing.y))  # fmt: skip
    return np.maximum.reduce([coverage(thing.shape, thing.radius, x, y, size) for x in xs for y in ys])


def render(scene: VideoScene) -> UInt8[Tensor, "frames 3 size size"]:
    """Draw a scene. Divide by 255 for the floats in [0, 1] that rewards and models take."""
    return draw(unroll(scene), scene.background, scene.size)
