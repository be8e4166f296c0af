"""The Shapes world: areas and places of what is drawn, determinism, and what training scenes never show."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest

from mmalign.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_OBJECTS,
    SHAPES,
    Object,
    Quality,
    Scene,
    coverage,
    degrade,
    holds,
    is_held_out,
    render,
    sample_scene,
)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", (2 * 0.86) ** 2),
        ("triangle", 1.1**2 * 3 * 3**0.5 / 4),
        ("star", 10 * 0.5 * 1.1 * 0.47 * np.sin(np.pi / 5)),
        ("ring", np.pi * (1.0 - 0.48**2)),
        ("cross", 2 * (2 * 0.66) - 0.66**2),
    ],
)
def test_area_of_each_shape_is_the_closed_form(shape: str, area: float) -> None:
    assert coverage(shape, 20.0, 32.0, 32.0).sum() == pytest.approx(area * 400, rel=0.01)


def test_object_is_drawn_at_its_centre_in_its_colour() -> None:
    image = render(Scene((Object("square", "pink", "large", 20.0, 44.0, 12.0),), "navy"))
    assert tuple(image[44, 20]) == COLOURS["pink"]
    assert tuple(image[10, 50]) == BACKGROUNDS["navy"]
    rows, columns = np.nonzero((image != image[0, 0]).any(-1))
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((20.0, 44.0), abs=0.1)


def test_rendering_is_the_same_on_every_machine() -> None:
    rng = np.random.default_rng(3)
    digest = hashlib.sha256()
    for _ in range(5):
        digest.update(repr(sample_scene(rng)).encode())
    again = np.random.default_rng(3)
    scenes = [sample_scene(again) for _ in range(5)]
    assert digest.hexdigest() == hashlib.sha256("".join(map(repr, scenes)).encode()).hexdigest()
    assert all((render(s) == render(s)).all() for s in scenes)


def test_training_scenes_never_show_what_is_held_out_and_never_touch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        scene = sample_scene(rng)
        assert not is_held_out(scene)
        assert not {(o.colour, o.shape) for o in scene.objects} & HELD_OUT_OBJECTS
        for a, b in combinations(scene.objects, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2.9


def test_every_kind_of_thing_occurs() -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng) for _ in range(600)]
    assert {o.shape for s in scenes for o in s.objects} == set(SHAPES)
    assert {o.colour for s in scenes for o in s.objects} == set(COLOURS)
    assert {len(s.objects) for s in scenes} == {1, 2, 3, 4}
    crisp = np.mean([s.quality.kind == "crisp" for s in scenes])
    assert crisp == pytest.approx(0.65, abs=0.06)


def test_degradations_do_what_they_say() -> None:
    image = np.full((64, 64, 3), 228.0, np.float32)
    assert degrade(image, Quality("low contrast", 1.0))[0, 0, 0] == 128 + 0.4 * 100
    assert degrade(image - 100, Quality("noisy", 0.0), 5).std() == pytest.approx(14.0, rel=0.05)
    edge = np.where(np.arange(64)[None, :, None] < 32, 0.0, 200.0) * np.ones((64, 1, 3))
    assert (
        np.abs(np.diff(degrade(edge.astype(np.float32), Quality("blurred", 0.5))[32, :, 0].astype(float))).max() < 80
    )


@pytest.mark.parametrize(
    ("relation", "b", "expected"),
    [
        ("left of", (40, 22), True),
        ("left of", (10, 20), False),
        ("left of", (24, 50), False),
        ("right of", (5, 20), True),
        ("above", (22, 40), True),
        ("below", (22, 2), True),
        ("next to", (40, 20), True),
        ("next to", (60, 60), False),
    ],
)
def test_relations(relation: str, b: tuple[float, float], expected: bool) -> None:
    assert holds(relation, (20.0, 20.0, 8.0), (*map(float, b), 8.0)) is expected
