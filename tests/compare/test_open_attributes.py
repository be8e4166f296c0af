"""The entropy of what prompts leave open: the estimate and its intervals, and the table in a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.compare.config import make_compare_config
from mmalign.compare.entropy import entropy_values, ratio_values
from mmalign.compare.run import compare
from mmalign.compare.stats import interval_over_seeds
from mmalign.core.registry import open_attributes
from mmalign.shapes.world import BACKGROUNDS, COLOURS, Object, Scene, render

ARRAY = Sequence[Sequence[float]]


def plain_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def test_one_image_a_prompt_is_millers_correction() -> None:
    # 30, 15 and 5 images of three kinds, each of its own prompt.
    counts = np.repeat(np.eye(3), [30, 15, 5], axis=0)
    plain = -(0.6 * np.log2(0.6) + 0.3 * np.log2(0.3) + 0.1 * np.log2(0.1))
    miller = (3 - 1) / (2 * 50 * np.log(2))
    assert entropy_values(counts).mean() == pytest.approx(plain + miller * 50 / 49)


def test_images_of_a_prompt_that_agree_count_as_one() -> None:
    once, thrice = np.repeat(np.eye(2), [12, 4], axis=0), 3 * np.repeat(np.eye(2), [12, 4], axis=0)
    np.testing.assert_allclose(entropy_values(thrice), entropy_values(once))


def test_equal_shares_have_no_more_than_all_bits_and_one_kind_has_none() -> None:
    assert entropy_values(np.array([[2.0, 0.0], [0.0, 2.0]])).mean() == pytest.approx(1.0)
    np.testing.assert_array_equal(entropy_values(np.array([[2.0, 0.0], [3.0, 0.0]])), [0.0, 0.0])


def test_values_are_the_influence_of_each_prompt() -> None:
    """The derivative of the plain entropy with respect to a prompt's weight, by finite differences."""
    counts = np.random.default_rng(0).integers(0, 4, (9, 4)).astype(float)
    counts[3] = 0  # a prompt that shows nothing of it
    values, step = entropy_values(counts), 1e-6
    for prompt in range(len(counts)):
        weights = np.ones(len(counts))
        weights[prompt] += step
        slope = (plain_bits((weights[:, None] * counts).sum(0)) - plain_bits(counts.sum(0))) / step
        assert len(counts) * slope == pytest.approx(values[prompt] - values.mean(), abs=1e-4)


def test_the_ratio_is_linearised_at_the_means() -> None:
    draw = np.random.default_rng(1)
    values, base = draw.normal(2, 0.3, (8, 1)), draw.normal(4, 0.3, (8, 1))
    found = ratio_values(values, base)
    assert found.mean() == pytest.approx(values.mean() / base.mean())
    moved, step = values.copy(), 1e-6
    moved[2] += step
    slope = (moved.mean() / base.mean() - values.mean() / base.mean()) / step
    assert slope == pytest.approx(1 / 8 / base.mean(), rel=1e-4)
    np.testing.assert_allclose(ratio_values(base, base), np.ones((8, 1)))


@pytest.mark.parametrize("shares", [[0.36, 0.34, 0.2, 0.1], [0.25] * 4])
def test_intervals_hold_the_truth(shares: list[float]) -> None:
    """55 prompts x 2 images, each prompt with a taste of its own. A percentile bootstrap holds 0 to 87 %."""
    draw, held, biases = np.random.default_rng(0), 0, []
    truth = plain_bits(np.array(shares))
    for _ in range(150):
        tastes = draw.dirichlet(2 * np.array(shares), size=55)
        counts = np.stack([draw.multinomial(2, taste) for taste in tastes]).astype(float)
        values = entropy_values(counts)[:, None]
        low, high = interval_over_seeds(values, resamples=300) or (0, 0)
        held += low <= truth <= high
        biases.append(values.mean() - truth)
    assert held >= 0.88 * 150
    assert abs(np.mean(biases)) < 0.02


# ------------------------------------------------------------------------------------------ in a comparison

PROMPTS = ["a red circle", "a red circle on a black background", "a green square", "a star above a ring"]


def drawn(background: str, size: str, x: float) -> np.ndarray:
    radius = {"small": 8.5, "large": 13.0}[size]
    return render(Scene((Object("circle", "red", size, x, 32.0, radius),), background))


def folder_of(root: Path, name: str, images: list[list[np.ndarray]]) -> dict[str, str]:
    folder = root / name
    folder.mkdir()
    for index, row in enumerate(images):
        for seed, pixels in enumerate(row):
            Image.fromarray(pixels).save(folder / f"{index:04d}-{seed}.png")
    return {"name": name, "images": str(folder)}


def config_of(root: Path, systems: list[dict[str, str]], prompts: Sequence[str], **changes: Any) -> Any:
    (root / "prompts.txt").write_text("\n".join(prompts) + "\n")
    values: dict[str, Any] = {
        "systems": systems,
        "prompts": str(root / "prompts.txt"),
        "rewards": ["shapes-quality"],
        "output": str(root / "out"),
        "resamples": 200,
    }
    return make_compare_config(**{**values, **changes})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    root = tmp_path_factory.mktemp("open")
    names = list(BACKGROUNDS)
    wide = [[drawn(names[(index + seed) % 4], ("small", "large")[seed], 16 + 16 * index) for seed in (0, 1)]
            for index in range(3)]  # fmt: skip
    narrow = [[drawn("navy", "large", 32.0)] * 2] * 3
    systems = [folder_of(root, "wide", wide), folder_of(root, "narrow", narrow)]
    result = compare(config_of(root, systems, PROMPTS[:3]))
    yield result.results, result.report


def test_a_comparison_reports_what_shapes_prompts_leave_open(outcome: tuple[dict[str, Any], Path]) -> None:
    found = outcome[0]["open_attributes"]
    background = found["background"]
    assert background["most"] == 2.0
    # The two prompts that name no background: white, black; gray, navy.
    assert (background["systems"]["wide"]["bits"], background["systems"]["wide"]["count"]) == (2.0, 4)
    narrow = background["systems"]["narrow"]
    assert (narrow["bits"], narrow["favourite"], narrow["favourite_share"]) == (0.0, "navy", 1.0)
    assert (narrow["versus_baseline"]["delta"], narrow["versus_baseline"]["share"]) == (-2.0, 0.0)
    # The circle is asked for by two prompts; no thing of the images fits "a green square".
    assert found["size"]["systems"]["wide"] | {"ci95": None} == {
        "bits": 1.0, "ci95": None, "favourite": "small", "favourite_share": 0.5, "count": 4,
    }  # fmt: skip
    assert found["place"]["systems"]["wide"]["favourite"] in ("middle left", "middle centre")
    assert "colour" not in found  # every prompt names it


def test_report_shows_the_table(outcome: tuple[dict[str, Any], Path]) -> None:
    page = outcome[1].read_text()
    assert "What prompts leave open" in page and "background (of 2.00)" in page and "navy 100%" in page
    json.loads((outcome[1].parent / "results.json").read_text())["open_attributes"]["background"]


def test_off_other_sizes_and_other_prompts(tmp_path: Path) -> None:
    images = [[drawn("navy", "large", 32.0)] * 2]
    systems = [folder_of(tmp_path, "a", images), folder_of(tmp_path, "b", images)]
    off = compare(config_of(tmp_path, systems, PROMPTS[:1], open_attributes=False, output=str(tmp_path / "off")))
    assert "open_attributes" not in off.results
    other = compare(config_of(tmp_path, systems, ["a cat"], output=str(tmp_path / "other")))
    assert "open_attributes" not in other.results
    big = [[np.zeros((32, 32, 3), np.uint8)] * 2]
    systems = [folder_of(tmp_path, "c", big), folder_of(tmp_path, "d", big)]
    rewards = ["tiny_runs:Brightness"]
    small = compare(config_of(tmp_path, systems, PROMPTS[:1], rewards=rewards, output=str(tmp_path / "small")))
    assert "open_attributes" not in small.results


def test_a_reader_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mood:
        """Whether an image is dark."""

        name = "mood"
        kinds: Mapping[str, Sequence[str]] = {"mood": ("dark", "light")}

        def knows(self, prompts: Sequence[str], width: int, height: int) -> bool:
            return all("cat" in prompt for prompt in prompts)

        def read(self, prompt: str, image: np.ndarray) -> dict[str, list[str]]:
            return {"mood": ["dark" if image.mean() < 100 else "light"]}

    monkeypatch.setattr(open_attributes, "_registered", {})
    open_attributes.register(Mood)
    images = [[drawn("navy", "large", 32.0), drawn("white", "large", 32.0)]]
    systems = [folder_of(tmp_path, "a", images), folder_of(tmp_path, "b", images)]
    found = compare(config_of(tmp_path, systems, ["a cat"])).results["open_attributes"]
    assert list(found) == ["mood"] and found["mood"]["systems"]["a"]["bits"] == pytest.approx(1.0)
    # One prompt cannot be resampled.
    assert found["mood"]["systems"]["a"]["ci95"] is None


def test_colours_are_read_where_none_is_named() -> None:
    from mmalign.shapes.open_attributes import ShapesOpenAttributes

    reader = ShapesOpenAttributes()
    things = (Object("star", "red", "small", 32.0, 12.0, 8.5), Object("ring", "cyan", "large", 32.0, 45.0, 13.0))
    image = render(Scene(things, "gray"))
    assert reader.read(PROMPTS[3], image) == {
        "background": ["gray"], "size": ["small", "large"], "place": [], "colour": ["red", "cyan"],
    }  # fmt: skip
    assert reader.read("a small red star on a gray background", image) == {
        "background": [], "size": [], "place": ["top centre"], "colour": [],
    }  # fmt: skip
    assert set(reader.kinds["colour"]) == set(COLOURS)
    # Nothing in the image fits: only the background is read.
    assert reader.read("a blue square", image) == {"background": ["gray"], "size": [], "place": [], "colour": []}
