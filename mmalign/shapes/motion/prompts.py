"""The prompt sets of moving Shapes, split by wording as those of the image world are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmalign.shapes.language import Group, split_of
from mmalign.shapes.motion.language import Action, MotionQuery, parse, write
from mmalign.shapes.motion.world import EVENTS, HELD_OUT_MOTIONS, MOTIONS, SPEEDS
from mmalign.shapes.prompts import write_sets
from mmalign.shapes.video import DIRECTIONS
from mmalign.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT_OBJECTS, RADII, SHAPES

TEST_COUNTS = {
    "Motion": 40, "Speed": 36, "Events": 44, "Two Objects": 28, "Order": 12, "Conflicting": 28, "Still": 12,
}  # fmt: skip
"""Prompts of each category in `shapes-motion-test`, 200 in all."""

_CHANGES = ("grow", "shrink", *EVENTS)


def asks_for_held_out(query: MotionQuery) -> bool:
    """Whether a query asks for a held-out combination of colour or motion with a shape."""
    return any(
        (a.group.shape, a.motion) in HELD_OUT_MOTIONS
        or any((c, a.group.shape) in HELD_OUT_OBJECTS for c in (a.group.colour, a.colour))
        for a in query.actions
    )


def _pick(rng: np.random.Generator, items: object) -> str:
    return str(rng.choice(list(items)))  # type: ignore[call-overload]


def _action(rng: np.random.Generator, motions: tuple[str, ...], fast: float = 0.0) -> Action:
    """An action of training: `fast` is the chance that a speed is named."""
    motion, colour, other = _pick(rng, motions), *(str(c) for c in rng.permutation(list(COLOURS))[:2])
    size = _pick(rng, RADII) if motion not in ("grow", "shrink") and rng.random() < 0.15 else None
    speed = _pick(rng, SPEEDS) if motion in DIRECTIONS and rng.random() < fast else None
    return Action(Group(_pick(rng, SHAPES), 1, colour, size), motion, speed, other if motion == "recolour" else None)


def _query(rng: np.random.Generator, *actions: Action, ordered: bool = False) -> MotionQuery:
    return MotionQuery(actions, _pick(rng, BACKGROUNDS) if rng.random() < 0.3 else None, ordered)


def _conflicting(rng: np.random.Generator) -> MotionQuery:
    shape, motion = sorted(HELD_OUT_MOTIONS)[int(rng.integers(len(HELD_OUT_MOTIONS)))]
    action = _action(rng, (motion,))
    held_out = Action(Group(shape, 1, action.group.colour), motion, None, action.colour)
    return _query(rng, held_out)


_CATEGORIES: dict[str, Callable[[np.random.Generator], MotionQuery]] = {
    "Motion": lambda rng: _query(rng, _action(rng, tuple(DIRECTIONS))),
    "Speed": lambda rng: _query(rng, _action(rng, tuple(DIRECTIONS), 1.0)),
    "Events": lambda rng: _query(rng, _action(rng, _CHANGES)),
    "Two Objects": lambda rng: _query(rng, _action(rng, MOTIONS, 0.3), _action(rng, MOTIONS, 0.3)),
    "Order": lambda rng: _query(rng, _action(rng, EVENTS), _action(rng, EVENTS), ordered=True),
    "Conflicting": _conflicting,
    "Still": lambda rng: _query(rng, _action(rng, ("still",))),
}


def _is_drawable(query: MotionQuery) -> bool:
    """Whether the clips of the world include it: shapes and colours all differ."""
    shapes = [a.group.shape for a in query.actions]
    colours = [c for a in query.actions for c in (a.group.colour, a.colour) if c is not None]
    return len(set(shapes)) == len(shapes) and len(set(colours)) == len(colours)


def make_prompts(counts: dict[str, int], split: str, seed: int) -> list[tuple[str, str]]:
    """(prompt, category) pairs of the given split, all different, deterministic from `seed`."""
    rng, rows, taken = np.random.default_rng(seed), [], set()
    for category, count in counts.items():
        made = 0
        while made < count:
            query = _CATEGORIES[category](rng)
            if not _is_drawable(query) or asks_for_held_out(query) != (category == "Conflicting"):
                continue
            text = write(rng, query)
            if text in taken or split_of(text) != split:
                continue
            assert parse(text) == query, text
            taken.add(text)
            rows.append((text, category))
            made += 1
    return rows


def write_motion_prompt_sets(folder: Path) -> None:
    """Make `shapes-motion-test`, `shapes-motion-validation` and `shapes-motion-train` again in `folder`."""
    names = ("shapes-motion-test", "shapes-motion-validation", "shapes-motion-train")
    write_sets(folder, names, TEST_COUNTS, make_prompts, train=12, seed=201)
