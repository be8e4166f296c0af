"""The oracle: right on drawn scenes, graded as documented, sensible on pictures that no scene made."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.shapes.check import check_oracle
from mmalign.shapes.oracle import correctness, quality, read, strict_correctness
from mmalign.shapes.world import Object, Quality, Scene, render

CRISP = Quality()


def scene(*objects: tuple[str, str, float, float], background: str = "white", quality: Quality = CRISP) -> np.ndarray:
    return render(Scene(tuple(Object(s, c, "small", x, y, 8.5) for s, c, x, y in objects), background, None, quality))


def test_reads_fresh_scenes_right() -> None:
    rows = {(row.quality, row.scene): row.right / row.scenes for row in check_oracle(500, seed=11)}
    assert rows["crisp", "all"] >= 0.97
    assert rows["degraded (all kinds)", "all"] >= 0.90


def test_reports_what_where_and_how_large() -> None:
    image = render(
        Scene(
            (Object("star", "cyan", "large", 40.0, 22.0, 13.0), Object("ring", "red", "small", 14.0, 50.0, 8.0)),
            "black",
        )
    )
    reading = read(image)
    assert reading.background == "black"
    star, ring = reading.objects
    assert (star.shape, star.colour, star.size, ring.shape, ring.colour, ring.size) == (
        "star",
        "cyan",
        "large",
        "ring",
        "red",
        "small",
    )
    assert (star.x, star.y, ring.x, ring.y) == pytest.approx((40.0, 22.0, 14.0, 50.0), abs=0.5)
    assert (star.radius, ring.radius) == pytest.approx((13.0, 8.0), rel=0.07)


def test_touching_objects_of_two_colours_are_told_apart() -> None:
    reading = read(scene(("square", "red", 22, 32), ("square", "blue", 37, 32)))
    assert sorted((o.shape, o.colour) for o in reading.objects) == [("square", "blue"), ("square", "red")]


TWO = (("circle", "red", 16, 32), ("square", "blue", 48, 32))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle and a blue square", 1.0),
        ("a red circle to the left of a blue square on a white background", 1.0),
        ("a blue square to the left of a red circle", (5 + 2 + 0) / 9),
        ("a red circle and a blue square on a black background", (5 + 2 + 0) / 8),
        ("a red circle and a green square", (5 * 0.75 + 2) / 7),
        ("a blue circle and a red square", (5 * 0.5 + 2) / 7),
        ("a red circle", (5 * 0.5 + 2 * 0.5) / 7),
        ("a red circle, a blue square and a green star", (5 * 2 / 3 + 2 * 2 / 3) / 7),
        ("a large red circle and a blue square", (5 * (2 / 3 + 1) / 2 + 2) / 7),
    ],
)
def test_grades_are_the_documented_arithmetic(prompt: str, expected: float) -> None:
    image = scene(*TWO)
    assert correctness(prompt, image) == pytest.approx(expected, abs=1e-6)
    assert strict_correctness(prompt, image) == float(expected == 1.0)


def test_counting_loses_by_each_missing_or_extra_thing() -> None:
    three = scene(*[("star", "green", x, y) for x, y in ((14, 14), (48, 16), (30, 48))])
    assert correctness("three green stars", three) == 1.0
    assert correctness("four green stars", three) == pytest.approx((5 * 0.75 + 2 * 0.75) / 7)
    assert correctness("two green stars", three) == pytest.approx((5 * 2 / 3 + 2 * 2 / 3) / 7)


def test_quality_falls_with_each_degradation_and_ignores_content() -> None:
    assert quality(scene(*TWO)) > 0.97
    assert quality(scene(TWO[0], background="navy")) > 0.97
    for kind in ("blurred", "noisy", "low contrast"):
        mild, strong = (quality(scene(*TWO, quality=Quality(kind, s))) for s in (0.0, 1.0))
        assert strong < mild < 0.7, kind


def test_pictures_that_no_scene_made_get_low_marks_without_failing() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert quality(noise) < 0.05
    assert correctness("a red circle", noise) < 0.5
    assert correctness("a red circle", np.full((64, 64, 3), 245, np.uint8)) == 0.0
    with pytest.raises(ValueError, match="64x64"):
        read(np.zeros((32, 32, 3), np.uint8))
