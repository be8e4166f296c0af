"""`mmalign pairs sample` and `pairs label`: deterministic, resumable, honest counts, readable by our own reader."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import build_tiny_sd

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.images import decode_image, encode_png, find_images
from mmalign.core.io.parquet import read_metadata
from mmalign.data.building import sampling as build
from mmalign.data.building.sampling import SCHEMA, SampleSettings, prompt_id, sample_images
from mmalign.data.pairs import read_pairs
from mmalign.data.prompts import Prompt
from mmalign.scoring import labelling
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.chosen import parse_rewards
from mmalign.scoring.labelling import LabelSettings, label_pairs
from pipelines import load_generator
from rewards import Reward, register

SETTINGS = SampleSettings(model="tiny", fingerprint="f", steps=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("model") / "sd", vae="tiny")


class Brightness(Reward):
    """A reward whose values the tests know: the mean of the pixels."""

    name = "test-loaded-brightness"

    def score(self, media: torch.Tensor, prompts: object, references: object) -> torch.Tensor:
        assert prompts is None
        return media.mean((1, 2, 3))


class Darkness(Brightness):
    higher_is_better = False


class NoBlack(Brightness):
    """Brightness, but not a number for an image that is too dark."""

    def __init__(self, above: float = 0.0) -> None:
        super().__init__()
        self.above = above

    def score(self, media: torch.Tensor, prompts: object, references: object) -> torch.Tensor:
        scores = super().score(media, prompts, references)
        return scores.where(scores > self.above, math.nan)


def written_images(path: Path, levels: dict[str, list[float]]) -> Path:
    """Write what `pairs sample` would, with images of known brightness."""
    rows = [
        {"prompt": text, "category": "", "prompt_id": prompt_id(text), "seed": seed, "model": "m",
         "image": encode_png(torch.full((3, 2, 2), level))}
        for text, values in levels.items()
        for seed, level in enumerate(values)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def label(path: Path, **options: object) -> tuple[list[dict], object]:
    out = path.with_name("pairs.parquet")
    rewards = options.pop("rewards", [WeightedReward("brightness", 1.0, Brightness())])
    counts = label_pairs(path, rewards, out, LabelSettings(**options), batch_size=3)
    return pq.read_table(out).to_pylist(), counts


def sample(model: str, out: Path, *options: str, prompts: str = "red circle") -> int:
    return main(["pairs", "sample", model, "--prompts", prompts, "--out", str(out), "--steps", "1", *options])


def test_sample_writes_distinct_images_grouped_by_prompt(model, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("Prompts,Category\nred circle,A\nblue star,B\nred circle,C\n")
    options = ("--images-per-prompt", "3", "--batch-size", "4")
    assert sample(model, tmp_path / "out", *options, prompts=str(tmp_path / "p.csv")) == 0
    assert "6 images (6 new) of 2 prompts (1 repeated ones left out)" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert [(row["prompt"], row["category"]) for row in rows] == [("red circle", "A")] * 3 + [("blue star", "B")] * 3
    assert len({row["seed"] for row in rows}) == len({row["image"] for row in rows}) == 6
    assert decode_image(rows[0]["image"]).shape == (3, 16, 16)
    settings = read_metadata(tmp_path / "out" / "images.parquet")["settings"]
    assert (settings["model"], settings["steps"], settings["guidance"]) == (model, 1, 7.5)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["images.parquet"]


def test_interrupted_sampling_goes_on_and_gives_the_same_file(model, tmp_path, monkeypatch):
    prompts = [Prompt(text) for text in ("red circle", "star", "two", "green", "blue")]
    monkeypatch.setattr(build, "PART_ROWS", 2)
    options = {"images_per_prompt": 2, "batch_size": 2}

    def run(name: str) -> build.SampleCounts:
        return sample_images(lambda: load_generator(model), prompts, tmp_path / name, SETTINGS, **options)

    assert run("whole") == build.SampleCounts(prompts=5, repeated_prompts=0, images=10, new=10)
    real, made = build.generate_images, []

    def killed(*args: object, **keywords: object):
        for item in real(*args, **keywords):
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(item)
            yield item

    monkeypatch.setattr(build, "generate_images", killed)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert len(list((tmp_path / "parts" / "parts").glob("*.parquet"))) == 3
    shutil.copy(tmp_path / "whole" / "images.parquet", tmp_path / "parts")  # finished once, now being added to
    with pytest.raises(UserError, match="sampling is not finished"):
        find_images(tmp_path / "parts")
    (tmp_path / "parts" / "images.parquet").unlink()
    monkeypatch.setattr(build, "generate_images", real)
    assert run("parts").new == 5
    whole, parts = (pq.read_table(tmp_path / name / "images.parquet").to_pylist() for name in ("whole", "parts"))
    assert [(row["prompt"], row["seed"]) for row in whole] == [(row["prompt"], row["seed"]) for row in parts]
    for one, other in zip(whole, parts, strict=True):
        assert float((decode_image(one["image"]) - decode_image(other["image"])).abs().max()) <= 1.01 / 255


def test_more_prompts_and_images_are_added_to_what_is_there(model, tmp_path):
    def run(texts: list[str], count: int, settings: SampleSettings = SETTINGS) -> int:
        prompts = [Prompt(text) for text in texts]
        opened = lambda: load_generator(model)  # noqa: E731
        return sample_images(opened, prompts, tmp_path, settings, images_per_prompt=count).new

    assert run(["red", "star"], 2) == 4
    first = pq.read_table(tmp_path / "images.parquet").to_pylist()
    assert run(["star", "blue"], 3) == 4
    rows = pq.read_table(tmp_path / "images.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == ["red"] * 2 + ["star"] * 3 + ["blue"] * 3
    assert rows[:4] == first

    def refuse() -> object:
        raise AssertionError("nothing is missing, so no model is to be loaded")

    assert sample_images(refuse, [Prompt("red")], tmp_path, SETTINGS, images_per_prompt=2).new == 0
    with pytest.raises(UserError, match=r"other settings \(fingerprint f -> g, steps 1 -> 2\); choose another --out"):
        run(["red"], 2, SampleSettings(model="tiny", fingerprint="g", steps=2))


def test_best_against_worst(tmp_path):
    levels = {"a": [0.2, 0.8, 0.4, 0.6], "b": [0.4, 0.4], "c": [0.6], "d": [0.0, 0.2]}
    path = written_images(tmp_path / "i.parquet", levels)
    rows, counts = label(path, pairs_per_prompt=2, min_margin=0.25)
    assert len(rows) == 1
    chosen = int(rows[0]["label_1"])
    assert rows[0][f"score_{chosen}"] == pytest.approx(0.8) and rows[0][f"score_{1 - chosen}"] == pytest.approx(0.2)
    assert rows[0]["best_image_uid"] == rows[0][f"image_{chosen}_uid"]
    assert str(counts) == (
        "1 pairs from 1 of 4 prompts, mean margin 0.6; prompts left out: 1 as ties, 1 below min_margin, "
        "0 with scores that are not finite, 1 with a single image; 1 more pairs left out as ties or below min_margin"
    )
    rows, counts = label(path, pairs_per_prompt=2)
    assert [row["caption"] for row in rows] == ["a", "a", "d"]
    assert counts.margin_sum == pytest.approx(0.6 + 0.2 + 0.2, abs=0.01)


def test_labels_agree_with_our_own_reader(tmp_path):
    path = written_images(tmp_path / "i.parquet", {f"p{n}": [n / 100, 1 - n / 100] for n in range(40)})
    rows, _ = label(path)
    assert 8 <= sum(row["label_0"] for row in rows) <= 32  # the chosen image is on either side
    assert {row["label_0"] + row["label_1"] for row in rows} == {1.0}
    out = str(tmp_path / "pairs.parquet")
    table = read_pairs(out, DataConfig(pairs=out))
    for record in table:
        assert float(decode_image(record.chosen).mean() - decode_image(record.rejected).mean()) == pytest.approx(
            record.margin, abs=1e-6
        )
        assert record.margin > 0
    assert table.metadata["rewards"] == [{"name": "brightness", "weight": 1.0}]
    assert table.metadata["labelling"]["mode"] == "best-worst"
    assert len(set(table.ids)) == 40


def test_weights_and_direction_of_several_rewards(tmp_path):
    path = written_images(tmp_path / "i.parquet", {"a": [0.2, 0.8]})
    both = [WeightedReward("up", 0.5, Brightness()), WeightedReward("down", 2.0, Darkness())]
    rows, _ = label(path, rewards=both)
    chosen = int(rows[0]["label_1"])
    assert rows[0][f"score_{chosen}"] == pytest.approx(0.5 * 0.2 - 2 * 0.2)
    assert read_metadata(tmp_path / "pairs.parquet")["rewards"] == [
        {"name": "up", "weight": 0.5},
        {"name": "down", "weight": 2.0},
    ]


def test_bradley_terry_frequencies_follow_the_temperature(tmp_path):
    levels = {f"p{n}": [51 / 255, 153 / 255] for n in range(600)}
    path = written_images(tmp_path / "i.parquet", levels)
    for temperature in (0.2, 1.0):
        _, counts = label(path, mode="bradley-terry", temperature=temperature)
        expected = 1 / (1 + math.exp(0.4 / temperature))
        spread = math.sqrt(expected * (1 - expected) / 600)
        assert counts.kept == 600
        assert abs(counts.against_score / 600 - expected) < 4 * spread
    _, noisy = label(path, label_noise=0.25)
    assert abs(noisy.against_score / 600 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 600)
    again, _ = label(path, label_noise=0.25)
    assert again == label(path, label_noise=0.25)[0] != label(path, label_noise=0.25, seed=1)[0]


def test_bradley_terry_draws_every_pair_of_images(tmp_path):
    path = written_images(tmp_path / "i.parquet", {f"p{n}": [0.0, 0.2, 0.4] for n in range(60)})
    rows, counts = label(path, mode="bradley-terry")
    drawn = Counter(tuple(sorted(round(row[f"score_{side}"], 1) for side in (0, 1))) for row in rows)
    assert set(drawn) == {(0.0, 0.2), (0.0, 0.4), (0.2, 0.4)} and min(drawn.values()) > 8
    assert len(label(path, mode="bradley-terry", pairs_per_prompt=9)[0]) == 180


def test_a_prompt_with_a_score_that_is_not_finite_is_left_out_and_counted(tmp_path, capsys):
    path = written_images(tmp_path / "i.parquet", {"a": [0.2, 0.8], "b": [0.0, 0.6], "c": [0.6, 0.4], "d": [0.0]})
    rows, counts = label(path, rewards=[WeightedReward("no-black", 1.0, NoBlack())])
    assert [row["caption"] for row in rows] == ["a", "c"] and counts.margin_sum == pytest.approx(0.8)
    assert "1 with scores that are not finite, 1 with a single image" in str(counts)
    assert "reward 'no-black' gave nan for an image of 'b'; prompts with such" in capsys.readouterr().err


def test_a_failing_label_run_keeps_the_old_pairs(tmp_path):
    path = written_images(tmp_path / "i.parquet", {"a": [0.2, 0.8]})
    rows, _ = label(path)

    with pytest.raises(UserError, match="no pair is left to write .* 1 with scores that are not finite"):
        label(path, rewards=[WeightedReward("broken", 1.0, NoBlack(above=1.0))])
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == rows
    with pytest.raises(UserError, match="no pair is left to write .*1 as ties"):
        label(written_images(tmp_path / "tie.parquet", {"a": [0.2, 0.2]}))
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no column 'prompt', 'prompt_id', 'seed', 'image', 'model'; found 'caption'"):
        label(tmp_path / "other.parquet")


def test_reward_lists():
    assert parse_rewards("clip, shapes-quality:0.5,my.module:Reward,my.module:Other:-2") == {
        "clip": 1.0,
        "shapes-quality": 0.5,
        "my.module:Reward": 1.0,
        "my.module:Other": -2.0,
    }
    for text, message in {
        "": "empty name",
        "clip,clip": "repeats 'clip'",
        "clip:0": "finite number other than 0",
        "clip:1.x": "'1.x' is no weight",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_rewards(text)


def test_sample_and_label_on_the_command_line(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\ntwo blue stars\n")
    assert sample(model, tmp_path / "s", "--images-per-prompt", "2", prompts=str(tmp_path / "p.txt")) == 0
    register(Brightness)
    command = ["pairs", "label", str(tmp_path / "s"), "--reward", "test-loaded-brightness:2"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "pairs.parquet")]) == 0
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [row["caption"] for row in rows] == ["a red circle", "two blue stars"]
    for row in rows:
        chosen = int(row["label_1"])
        margin = row[f"score_{chosen}"] - row[f"score_{1 - chosen}"]
        means = [float(decode_image(row[f"jpg_{side}"]).mean()) for side in (chosen, 1 - chosen)]
        assert margin == pytest.approx(2 * (means[0] - means[1]), abs=1e-6) and margin > 0
    assert "2 pairs from 2 of 2 prompts, mean margin" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "pairs.csv")]) == 2
    assert "name the file pairs.parquet" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "p.parquet"), "--temperature", "2"]) == 2
    assert main([*command, "--out", str(tmp_path / "p.parquet"), "--label-noise", "0.9"]) == 2
    assert "label_noise 0.9: must be from 0 to 0.5" in capsys.readouterr().err
    out = str(tmp_path / "p.parquet")
    assert main(["pairs", "label", str(tmp_path), "--reward", "x", "--out", out]) == 2
    assert "images.parquet: no column 'chosen', 'rejected'" in capsys.readouterr().err
    assert main(["pairs", "label", str(tmp_path / "s"), "--reward", "clipp", "--out", out]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_prompts_that_a_reward_cannot_read_are_told_before_an_image_is_scored(tmp_path, capsys, monkeypatch):
    written_images(tmp_path / "images.parquet", {"a red circle": [0.2, 0.8], "a lazy dog": [0.2, 0.8]})
    monkeypatch.setattr(labelling, "label_pairs", lambda *a, **k: pytest.fail("scored what cannot be labelled"))
    out = str(tmp_path / "pairs.parquet")
    assert main(["pairs", "label", str(tmp_path), "--reward", "shapes-quality,shapes-correctness", "--out", out]) == 2
    error = capsys.readouterr().err
    assert (
        "shapes-correctness cannot score 1 of 2 prompts: Shapes cannot read 'lazy' in the prompt 'a lazy dog'" in error
    )
    assert error.count("\n") == 1
