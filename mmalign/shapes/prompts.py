"""The prompt sets of Shapes: a DrawBench-style test set, a validation set, and training prompts.

Test and validation wordings are of the splits `test` and `validation` of :func:`mmalign.shapes.language.split_of`; the
training captions are all of split `train`, so none of them can be in training data.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmalign.shapes.language import Group, Query, misspell, parse, split_of, write
from mmalign.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_OBJECTS,
    HELD_OUT_RELATIONS,
    INVERSE,
    RELATIONS,
    SHAPES,
)

TEST_COUNTS = {
    "Colors": 40, "Counting": 44, "Positional": 40, "Conflicting": 24, "Descriptions": 24,
    "Misspellings": 14, "Rare Words": 14,
}  # fmt: skip
"""Prompts of each category in `shapes-drawbench` (200 in all), named as in DrawBench where DrawBench has the like."""


def asks_for_held_out(query: Query) -> bool:
    """Whether a query asks for a held-out combination, in either reading direction of its relations."""
    if any((group.colour, group.shape) in HELD_OUT_OBJECTS for group in query.groups):
        return True
    named = [(query.groups[a].shape, relation, query.groups[b].shape) for a, relation, b in query.relations]
    return any({(a, r, b), (b, INVERSE[r], a)} & HELD_OUT_RELATIONS for a, r, b in named)


def _pick(rng: np.random.Generator, items: object) -> str:
    return str(rng.choice(list(items)))  # type: ignore[call-overload]


def _allowed_kind(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        colour, shape = _pick(rng, COLOURS), _pick(rng, SHAPES)
        if (colour, shape) not in HELD_OUT_OBJECTS:
            return colour, shape


def _group(rng: np.random.Generator, count: int = 1, sized: float = 0.25) -> Group:
    colour, shape = _allowed_kind(rng)
    size = _pick(rng, ("small", "large")) if rng.random() < sized and count < 3 else None
    return Group(shape, count, colour, size)


def _background(rng: np.random.Generator, chance: float) -> str | None:
    return _pick(rng, BACKGROUNDS) if rng.random() < chance else None


def _colors(rng: np.random.Generator) -> tuple[Query, dict]:
    number = 1 if rng.random() < 0.4 else 2
    return Query(tuple(_group(rng) for _ in range(number)), (), _background(rng, 0.4)), {}


def _counting(rng: np.random.Generator) -> tuple[Query, dict]:
    count = int(rng.integers(2, 5))
    return Query((_group(rng, count),), (), _background(rng, 0.3)), {}


def _positional(rng: np.random.Generator) -> tuple[Query, dict]:
    while True:
        relation, groups = _pick(rng, RELATIONS), (_group(rng, sized=0.15), _group(rng, sized=0.15))
        query = Query(groups, ((0, relation, 1),), _background(rng, 0.3))
        if groups[0].shape != groups[1].shape and not asks_for_held_out(query):
            return query, {}


def _conflicting(rng: np.random.Generator) -> tuple[Query, dict]:
    """Combinations that no training image shows: a held-out object alone or with another, or a held-out relation."""
    draw = rng.random()
    if draw < 0.35:
        first, relation, second = sorted(HELD_OUT_RELATIONS)[int(rng.integers(len(HELD_OUT_RELATIONS)))]
        colours = [_pick(rng, [c for c in COLOURS if (c, s) not in HELD_OUT_OBJECTS]) for s in (first, second)]
        return Query(
            (Group(first, 1, colours[0]), Group(second, 1, colours[1])), ((0, relation, 1),), _background(rng, 0.2)
        ), {}
    colour, shape = sorted(HELD_OUT_OBJECTS)[int(rng.integers(len(HELD_OUT_OBJECTS)))]
    groups = (Group(shape, 1, colour),) + ((_group(rng, sized=0.0),) if draw > 0.7 else ())
    return Query(groups, (), _background(rng, 0.5)), {}


def _descriptions(rng: np.random.Generator) -> tuple[Query, dict]:
    query, _ = _positional(rng) if rng.random() < 0.6 else _colors(rng)
    return Query(query.groups, query.relations, _pick(rng, BACKGROUNDS)), {"long": True}


def _rare(rng: np.random.Generator) -> tuple[Query, dict]:
    query, _ = _colors(rng) if rng.random() < 0.7 else _counting(rng)
    return query, {"rare": 0.9}


_CATEGORIES: dict[str, Callable[[np.random.Generator], tuple[Query, dict]]] = {
    "Colors": _colors, "Counting": _counting, "Positional": _positional, "Conflicting": _conflicting,
    "Descriptions": _descriptions, "Misspellings": _colors, "Rare Words": _rare,
}  # fmt: skip


def make_prompts(counts: dict[str, int], split: str, seed: int) -> list[tuple[str, str]]:
    """(prompt, category) pairs of the given split, all different, deterministic from `seed`."""
    rng, rows, taken = np.random.default_rng(seed), [], set()
    for category, count in counts.items():
        made = 0
        while made < count:
            query, options = _CATEGORIES[category](rng)
            if len(query.groups) == 2 and (query.groups[0].shape, query.groups[0].colour) == (
                query.groups[1].shape,
                query.groups[1].colour,
            ):
                continue
            text = clean = write(rng, query, **options)
            if category == "Misspellings":
                text = misspell(rng, clean, words=2)
                if text == clean:
                    continue
            if text in taken or split_of(text) != split or parse(text) != parse(clean):
                continue
            taken.add(text)
            rows.append((text, category))
            made += 1
    return rows


def save_prompts(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write prompts in the columns of DrawBench's own CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("Prompts", "Category"))
        writer.writerows(rows)


def write_prompt_sets(folder: Path) -> None:
    """Make `shapes-drawbench`, `shapes-validation` and `shapes-train` again (byte for byte) in `folder`."""
    names = ("shapes-drawbench", "shapes-validation", "shapes-train")
    write_sets(folder, names, TEST_COUNTS, make_prompts, train=24, seed=101)


def write_sets(
    folder: Path,
    names: tuple[str, str, str],
    counts: dict[str, int],
    make: Callable[[dict[str, int], str, int], list[tuple[str, str]]],
    *,
    train: int,
    seed: int,
) -> None:
    """Write a test set of `counts`, a validation set of half of them, and a shuffled training set.

    The last has `train` times as many of each category but `Conflicting`; seeds are `seed` and the three after it.
    """
    half = {k: v // 2 for k, v in counts.items()}
    many = {k: train * v for k, v in counts.items() if k != "Conflicting"}
    save_prompts(folder / f"{names[0]}.csv", make(counts, "test", seed))
    save_prompts(folder / f"{names[1]}.csv", make(half, "validation", seed + 1))
    rows = make(many, "train", seed + 2)
    order = np.random.default_rng(seed + 3).permutation(len(rows))
    save_prompts(folder / f"{names[2]}.csv", [rows[i] for i in order])
