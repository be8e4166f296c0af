"""Families of conflicting videos: the same shapes on the same background, and another answer in each.

A family is made around one topic (:data:`mmalign.shapes.facts.TOPICS`) and holds one scene for every answer that its
question offers. Two members share as much as possible: a path and its reverse, a growth and its reverse, events in
rotated order show the very same frames; paths of different speed and manner start at independent, evenly spread places
of a frame that wraps around. So neither the question nor a frame without its place in time distinguishes the
members.

Families are assigned to splits by the hash of :func:`mmalign.shapes.language.split_of` over what they show, and
training
families never hold a (colour, shape) of `world.HELD_OUT_OBJECTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmalign.core.io.video_questions import TOPICS
from mmalign.shapes.facts import NUMBERS
from mmalign.shapes.language import split_of
from mmalign.shapes.video import DIRECTIONS, OPPOSITE, Actor, VideoScene, reverse, snap
from mmalign.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT_OBJECTS, SHAPES

SPLITS = ("train", "validation", "test")
LANE = 16
"""Pixels of a lane; shapes that are seen together have separate lanes and never touch."""

_RADIUS = (5.0, 6.0)
_SMALL, _BIG = (4.5, 5.0), (7.4, 8.0)
_PATH, _SLOW_PATH, _FAST = (0.25, 0.42), (0.14, 0.2), 2.1
"""Shares of the frame's side that a path covers, and fast over slow; less than half the side in all."""
_SHAKE = (3.0, 4.0)

Kind = tuple[str, str]
Members = tuple[tuple[VideoScene, str], ...]


@dataclass(frozen=True)
class Family:
    """Conflicting scenes about one topic: `values[i]` is the answer that scene i gives about `subject`.

    subject: the shapes that the question is about (topic shape: the colour; topic count: none).
    """

    topic: str
    subject: tuple[str, ...]
    scenes: tuple[VideoScene, ...]
    values: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The content of the family in words, which determine its split."""
        kinds = sorted({f"{colour} {shape}" for colour, shape in kinds_of(self.scenes)})
        return f"{self.topic} of {' and '.join(self.subject)}: {', '.join(kinds)} on {self.scenes[0].background}"

    @property
    def held_out(self) -> bool:
        """Whether it shows a (colour, shape) that no training family holds."""
        return not kinds_of(self.scenes).isdisjoint(HELD_OUT_OBJECTS)


def kinds_of(scenes: Sequence[VideoScene]) -> set[Kind]:
    """Every (colour, shape) that is seen at some time in some scene."""
    actors = [actor for scene in scenes for actor in scene.actors]
    later = {(colour, actor.shape) for actor in actors if (colour := actor.end_colour)}
    return {(actor.colour, actor.shape) for actor in actors} | later


@dataclass(frozen=True)
class _Stage:
    """The properties that all members of a family share, and the random generator."""

    rng: np.random.Generator
    frames: int
    size: int
    background: str
    held_out: bool

    def scene(self, actors: Sequence[Actor]) -> VideoScene:
        return VideoScene(tuple(actors), self.background, self.frames, self.size)

    def uniform(self, bounds: tuple[float, float]) -> float:
        return snap(self.rng.uniform(*bounds))

    def speed(self, bounds: tuple[float, float] = _PATH, steps: int | None = None) -> float:
        return snap(self.rng.uniform(*bounds) * self.size / (steps or self.frames - 1))

    def spot(self) -> float:
        return snap(self.rng.uniform(0, self.size))

    def allows(self, colour: str, shape: str) -> bool:
        return self.held_out or (colour, shape) not in HELD_OUT_OBJECTS

    def pick(self, items: Sequence[str]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def cast(self, number: int, axis: str | None = None) -> list[Actor]:
        """Still actors of different shapes and colours, each in a lane of its own along a random (or given) axis."""
        names = list(SHAPES), list(COLOURS)
        while True:
            shapes, colours = (self.rng.permutation(words)[:number].tolist() for words in names)
            if all(map(self.allows, colours, shapes)):
                break
        axis = axis or self.pick(("across", "down"))
        lanes = self.rng.permutation(number) * (self.size / number) + self.spot()
        actors = []
        for shape, colour, lane in zip(shapes, colours, lanes, strict=True):
            x, y = (self.spot(), snap(lane % self.size))
            x, y = (x, y) if axis == "across" else (y, x)
            direction = self.pick(("left", "right") if axis == "across" else ("up", "down"))
            actors.append(Actor(shape, colour, self.uniform(_RADIUS), x, y, direction))
        return actors

    def room(self, most: int) -> int:
        """A number of actors that fits, from one to `most`."""
        return int(self.rng.integers(1, min(most, self.size // LANE) + 1))

    def bystanders(self, actors: Sequence[Actor]) -> list[Actor]:
        """The same actors, each now moving straight on at a speed of its own, or not at all."""
        return [replace(a, speed=self.speed() if self.rng.random() < 0.7 else 0.0) for a in actors]

    def relocate(self, actor: Actor) -> Actor:
        """The same actor at another place along its lane."""
        if actor.direction in ("left", "right"):
            return replace(actor, x=self.spot())
        return replace(actor, y=self.spot())


def _direction(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """One actor: four directions. Several, whose lanes reveal the axis: forwards, backwards and still."""
    number = stage.room(3)
    if number > 1:
        first, *rest = stage.cast(number)
        rest = stage.bystanders(rest)
        there = stage.scene([replace(first, speed=stage.speed()), *rest])
        still = stage.scene([stage.relocate(first), *rest])
        values = (first.direction, OPPOSITE[first.direction], "still")
        return (first.shape,), tuple(zip((there, reverse(there), still), values, strict=True))
    actor, members = stage.cast(1)[0], []
    for way in ("left", "up"):
        actor = replace(actor, direction=way, x=stage.spot(), y=stage.spot(), speed=stage.speed())
        there = stage.scene([actor])
        members += [(there, way), (reverse(there), OPPOSITE[way])]
    return (actor.shape,), tuple(members)


def _speed(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """Two actors: either is the faster, or neither; every member has them at new places."""
    first, second = stage.cast(2)
    slow = stage.speed(_SLOW_PATH)
    fast, equal = snap(_FAST * slow), stage.pick(("slow", "fast"))
    pace = slow if equal == "slow" else fast
    members = [
        (stage.scene([replace(stage.relocate(first), speed=a), replace(stage.relocate(second), speed=b)]), value)
        for a, b, value in ((fast, slow, first.shape), (slow, fast, second.shape), (pace, pace, "equal"))
    ]
    return (first.shape, second.shape), tuple(members)


def _order(stage: _Stage, end: int) -> tuple[tuple[str, ...], Members]:
    """Two or three actors shown one after the other; the members are the rotations of the same events."""
    cast = stage.cast(2 + int(stage.rng.integers(2)))
    events = [replace(stage.relocate(a), speed=stage.speed() if stage.rng.random() < 0.5 else 0.0) for a in cast]
    cuts = np.linspace(0, stage.frames, len(events) + 1).round().astype(int)
    lengths = stage.rng.permutation(np.diff(cuts)).tolist()
    members = []
    for turn in range(len(events)):
        order = [(turn + i) % len(events) for i in range(len(events))]
        actors, start = [], 0
        for index in order:
            actors.append(_starting(events[index], start, lengths[index], stage.size))
            start += lengths[index]
        members.append((stage.scene(sorted(actors, key=lambda a: a.shape)), events[order[end]].shape))
    return tuple(a.shape for a in cast), tuple(members)


def _starting(event: Actor, start: int, length: int, size: int) -> Actor:
    """The event's actor, at its place in frame `start`, and seen for `length` frames from then on."""
    dx, dy = DIRECTIONS[event.direction]
    back = event.speed * start
    return replace(
        event, x=(event.x - dx * back) % size, y=(event.y - dy * back) % size, shown=((start, start + length),)
    )


def _growth(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """Growing, its reverse, and a constant size between the two."""
    first, *rest = stage.cast(stage.room(2))
    rest = stage.bystanders(rest)
    grower = replace(first, radius=stage.uniform(_SMALL), end_radius=stage.uniform(_BIG), speed=0.0)
    grows = stage.scene([grower, *rest])
    share = int(stage.rng.integers(stage.frames)) / (stage.frames - 1)
    same = replace(first, radius=snap(grower.radius + share * (grower.end_radius - grower.radius)))  # type: ignore[operator]
    return (first.shape,), ((grows, "grows"), (reverse(grows), "shrinks"), (stage.scene([same, *rest]), "same"))


def _recolouring(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """One colour to another, its reverse, and either of the two throughout."""
    first, *rest = stage.cast(stage.room(2))
    taken = {actor.colour for actor in (first, *rest)}
    other = stage.pick([c for c in COLOURS if c not in taken and stage.allows(c, first.shape)])
    rest = stage.bystanders(rest)
    changes = stage.scene([replace(first, end_colour=other, switch=stage.frames // 2), *rest])
    same = stage.scene([replace(first, colour=stage.pick((first.colour, other))), *rest])
    values = (f"{first.colour} to {other}", f"{other} to {first.colour}", "same")
    return (first.shape,), tuple(zip((changes, reverse(changes), same), values, strict=True))


def _motion(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """Four manners of moving, each from another place."""
    first, *rest = stage.cast(stage.room(2))
    rest = stage.bystanders(rest)
    speeds = {
        "straight": stage.speed(), "bounces": stage.speed(steps=stage.frames // 2),
        "shakes": stage.uniform(_SHAKE), "still": 0.0,
    }  # fmt: skip
    members = []
    for value, speed in speeds.items():
        manner = "straight" if value == "still" else value
        actor = replace(stage.relocate(first), manner=manner, speed=speed)
        members.append((stage.scene([actor, *rest]), value))
    return (first.shape,), tuple(members)


def _presence(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """Appearing, disappearing, hiding in between and showing up in between, each for half of the frames."""
    first, *rest = stage.cast(stage.room(2))
    rest = [replace(actor, speed=0.0) for actor in rest]
    frames, half = stage.frames, stage.frames // 2
    early, before = half // 2, (frames - half) // 2
    shown = {
        "appears": ((frames - half, frames),), "disappears": ((0, half),),
        "hides": ((0, early), (frames - half + early, frames)), "flashes": ((before, before + half),),
    }  # fmt: skip
    return (first.shape,), tuple((stage.scene([replace(first, shown=s), *rest]), v) for v, s in shown.items())


def _colour(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """The same video in four colours of one actor."""
    first, *rest = stage.bystanders(stage.cast(stage.room(3)))
    taken = {actor.colour for actor in rest}
    free = [c for c in COLOURS if c not in taken and stage.allows(c, first.shape)]
    colours = stage.rng.permutation(free)[:4].tolist()
    return (first.shape,), tuple((stage.scene([replace(first, colour=c), *rest]), c) for c in colours)


def _shape(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """The same video with four kinds of one actor."""
    first, *rest = stage.bystanders(stage.cast(stage.room(2)))
    taken = {actor.shape for actor in rest}
    free = [s for s in SHAPES if s not in taken and stage.allows(first.colour, s)]
    shapes = stage.rng.permutation(free)[:4].tolist()
    return (first.colour,), tuple((stage.scene([replace(first, shape=s), *rest]), s) for s in shapes)


def _count(stage: _Stage) -> tuple[tuple[str, ...], Members]:
    """One, two, three actors (as many as fit), the later members adding to the earlier ones."""
    actors = stage.bystanders(stage.cast(min(3, stage.size // LANE)))
    return (), tuple((stage.scene(actors[:n]), NUMBERS[n - 1]) for n in range(1, len(actors) + 1))


_SAMPLERS: dict[str, Callable[[_Stage], tuple[tuple[str, ...], Members]]] = {
    "direction": _direction, "speed": _speed,
    "first": lambda stage: _order(stage, 0), "last": lambda stage: _order(stage, -1),
    "growth": _growth, "recolouring": _recolouring, "motion": _motion, "presence": _presence,
    "colour": _colour, "shape": _shape, "count": _count,
}  # fmt: skip


def sample_family(
    rng: np.random.Generator, topic: str, split: str = "train", *, frames: int = 8, size: int = 48
) -> Family:
    """Draw a family of `split`; the same generator state gives the same family.

    Raises:
        KeyError: no such topic. ValueError: no such split, or frames or size out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    while True:
        background = str(rng.choice(list(BACKGROUNDS)))
        subject, members = _SAMPLERS[topic](_Stage(rng, frames, size, background, held_out=split != "train"))
        family = Family(topic, subject, tuple(s for s, _ in members), tuple(v for _, v in members))
        if split_of(family.shown) == split:
            return family


def sample_families(
    count: int,
    split: str = "train",
    seed: int = 0,
    *,
    topics: Sequence[str] = tuple(TOPICS),
    frames: int | Sequence[int] = 8,
    size: int = 48,
) -> Iterator[Family]:
    """Yield `count` families, topics taking turns; family k depends on (seed, split, k) and the options alone."""
    lengths = [frames] if isinstance(frames, int) else list(frames)
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        length = lengths[int(rng.integers(len(lengths)))]
        yield sample_family(rng, topics[index % len(topics)], split, frames=length, size=size)
