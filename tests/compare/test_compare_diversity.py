"""How much the images of a prompt differ: the numbers, what is embedded again, and that it decides nothing."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd

from mmalign.compare.config import CompareConfig, RewardEntry, load_compare_config, make_compare_config
from mmalign.compare.images.diversity import check_diversity, mean_distances, measure_diversity
from mmalign.compare.images.media import IMAGES
from mmalign.compare.images.store import ImageStore, Sampling
from mmalign.compare.run import compare
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from rewards import RewardError

REWARD = '''
from rewards import Reward, TwoTowerReward

class Colour(TwoTowerReward):
    """The mean colour is the embedding."""
    name = "colour"
    seen = []

    def __init__(self, *, gain=1.0, **options):
        super().__init__(**options)
        self.gain = gain

    def encode_media(self, media):
        self.seen.extend(media)
        return self.gain * media.mean(dim=(2, 3))

    def encode_prompts(self, prompts):
        raise AssertionError("no prompt is embedded")

    def compare(self, cosine):
        return cosine

class Blind(Colour):
    """Embeds nothing."""
    name = "blind"

    def encode_media(self, media):
        return media.mean(dim=(2, 3)) * float("nan")

class Brightness(Reward):
    """Mean of all pixels."""
    name = "brightness"

    def score(self, media, prompts, references):
        return media.mean(dim=(1, 2, 3))
'''
COLOUR, BRIGHTNESS = "tiny_diversity_rewards:Colour", "tiny_diversity_rewards:Brightness"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two models, prompts, and a module of rewards that can be imported."""
    folder = tmp_path_factory.mktemp("diversity")
    build_tiny_sd(folder / "base", vae="tiny")
    build_tiny_sd(folder / "tuned", vae="tiny", seed=1)
    (folder / "tiny_diversity_rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("tiny_diversity_rewards", None)


def config_of(room: Path, output: Path, **changes: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "systems": [{"name": name, "model": str(room / name)} for name in ("base", "tuned")],
        "prompts": str(room / "prompts.txt"),
        "rewards": [BRIGHTNESS],
        "diversity": COLOUR,
        "output": str(output),
        "seeds": [0, 1, 2],
        "steps": 1,
        "resamples": 100,
    }
    return make_compare_config(**{**values, **changes})


def store_of(folder: Path, colours: list[list[tuple[int, int, int]]]) -> ImageStore:
    """Images of one colour each, by prompt and seed."""
    prompts = [f"prompt {index}" for index in range(len(colours))]
    store = ImageStore(folder, "print", Sampling(1, 1.0), prompts, range(len(colours[0])))
    for index, row in enumerate(colours):
        for seed, colour in enumerate(row):
            store.put(index, seed, encode_png(Image.new("RGB", (8, 8), colour)))
    return store


def test_distances_of_embeddings_made_by_hand() -> None:
    """Angles of 0, 60 and 90 degrees; lengths do not matter."""
    half, root = 0.5, 3**0.5 / 2
    found = mean_distances(np.array([[2.0, 0.0], [0.1 * half, 0.1 * root], [0.0, 7.0]]))
    np.testing.assert_allclose(found, [(0.5 + 1) / 2, (0.5 + 1 - root) / 2, (1 + 1 - root) / 2])
    np.testing.assert_allclose(mean_distances(np.array([[1.0, 0.0], [-3.0, 0.0]])), [2.0, 2.0])
    np.testing.assert_allclose(mean_distances(np.ones((3, 5)) / 3), np.zeros(3), atol=1e-15)


def test_each_prompt_and_system_is_measured_by_itself(room: Path, tmp_path: Path) -> None:
    red, green, grey = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    stores = {
        "a": store_of(tmp_path / "a", [[red, green], [red, red]]),
        "b": store_of(tmp_path / "b", [[red, grey], [green, green]]),
    }
    entry = RewardEntry(name=COLOUR, label="diversity")
    scores, facts = measure_diversity(entry, stores, tmp_path / "cache")
    np.testing.assert_allclose(scores["a"], [[1, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(scores["b"], [[1 - 3**-0.5] * 2, [0, 0]], atol=1e-6)
    assert (facts.label, facts.neutral, facts.requested) == ("diversity", True, "diversity")

    from tiny_diversity_rewards import Colour

    Colour.seen.clear()
    stores["c"] = store_of(tmp_path / "c", [[green, red], [green, grey]])
    again, _ = measure_diversity(entry, stores, tmp_path / "cache")
    assert len(Colour.seen) == 2  # the two images of c's second prompt; those of its first are a's, in another order
    np.testing.assert_array_equal(again["a"], scores["a"])
    np.testing.assert_allclose(again["c"], [[1, 1], [1 - 3**-0.5] * 2], atol=1e-6)
    measure_diversity(RewardEntry(name=COLOUR, label="diversity", options={"gain": 2.0}), stores, tmp_path / "cache")
    assert len(Colour.seen) == 2 + 12  # another reward


def test_embeddings_are_units_in_the_order_of_the_media(room: Path) -> None:
    from tiny_diversity_rewards import Colour

    media = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = media.mean(dim=(2, 3)) / media.mean(dim=(2, 3)).norm(dim=1, keepdim=True)
    torch.testing.assert_close(Colour(batch_size=2).embeddings(media), expected)
    mixed = [media[0], media[1][:, :2], media[2]]
    means = torch.stack([one.mean(dim=(1, 2)) for one in mixed])
    torch.testing.assert_close(Colour().embeddings(mixed), means / means.norm(dim=1, keepdim=True))


def test_diversity_is_reported_and_decides_nothing(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = compare(config_of(room, tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["rewards"]) == [BRIGHTNESS, "diversity"]
    assert results["rewards"]["diversity"]["neutral"] and "neutral" not in results["rewards"][BRIGHTNESS]
    assert results["verdicts"]["tuned"]["versus_baseline"]["held_out"] == [BRIGHTNESS]
    versus = results["systems"]["tuned"]["versus_baseline"]["diversity"]
    assert versus["direction"] == 0 and versus["wins"] + versus["losses"] + versus["ties"] == 6
    assert versus["delta_ci95"][0] <= versus["delta"] <= versus["delta_ci95"][1]

    def distance(system: str) -> float:
        """The mean over prompts and pairs of seeds, straight from the images."""
        found = []
        for index in (0, 1):
            images = [Image.open(tmp_path / "out/images" / system / f"{index:04d}-{seed}.png") for seed in (0, 1, 2)]
            means = [np.asarray(image).mean(axis=(0, 1)) for image in images]
            for one, other in ((0, 1), (0, 2), (1, 2)):
                a, b = means[one], means[other]
                found.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
        return float(np.mean(found))

    means = {name: one["rewards"]["diversity"]["mean"] for name, one in results["systems"].items()}
    assert means == pytest.approx({name: distance(name) for name in ("base", "tuned")}, abs=1e-6)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["reward"] == "diversity"]
    assert len(rows) == 2 * 2 * 3 and "training_seed" not in rows[0]
    page = outcome.report.read_text()
    assert "neither better nor worse by itself" in page and "more →" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [4]}, "diversity: compares the seeds of a prompt, and seeds has only 4; add one"),
        ({"rewards": [{"name": BRIGHTNESS, "label": "diversity"}]}, "diversity: a reward is called 'diversity' too"),
        ({"diversity": {"name": "clip", "weight": 2}}, "diversity.weight"),
    ],
)
def test_configs_that_cannot_be(room: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_of(room, tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_what_embeds_no_image_is_refused_before_anything_is_drawn(room: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diversity: reward 'tiny_.*:Brightness' embeds no images; choose one"):
        compare(config_of(room, tmp_path / "out", diversity=BRIGHTNESS))
    with pytest.raises(RewardError, match="has no option 'gian'"):
        compare(config_of(room, tmp_path / "out", diversity={"name": COLOUR, "options": {"gian": 2}}))
    assert not (tmp_path / "out").exists()
    for name in ("clip", "pickscore", "shapes-clip"):
        check_diversity(RewardEntry(name=name), IMAGES)
    stores = {"a": store_of(tmp_path / "a", [[(9, 9, 9), (5, 5, 5)]])}
    with pytest.raises(UserError, match="embeds an image as nan or zero"):
        measure_diversity(RewardEntry(name="tiny_diversity_rewards:Blind", label="d"), stores, tmp_path / "cache")


def test_the_short_form_is_read_from_a_file_and_takes_options(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(
        "systems: [{name: a, model: a}, {name: b, model: b}]\n"
        "prompts: p\nrewards: [clip]\noutput: o\ndiversity: clip\n"
    )
    assert load_compare_config(path).diversity == RewardEntry(name="clip")
    read = load_compare_config(path, ["diversity.options.weights=here", "diversity.label=spread"])
    assert read.diversity == RewardEntry(name="clip", label="spread", options={"weights": "here"})
