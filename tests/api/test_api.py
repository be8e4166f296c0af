"""`import mmalign` in a notebook: names, training on objects, drawing, scoring; held to the command line's results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_runs import Brightness, losses, run_config, write_pairs

import mmalign
from mmalign.api.train import TrainResult
from mmalign.core.errors import UserError
from mmalign.core.registry import methods
from mmalign.methods.base import LossOutput
from mmalign.methods.sft import SFT
from mmalign.training.train import train as train_run
from rewards import registry


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {"sd": build_tiny_sd(folder / "sd"), "pairs": write_pairs(folder / "data"), "folder": folder}


def image_pairs(path: Path) -> list[dict[str, Any]]:
    """Read the pairs of `write_pairs` as objects: PIL images beside their prompt."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sides = ("chosen", "rejected")
    return [{"prompt": row["prompt"], **{side: Image.open(path.parent / row[side]) for side in sides}} for row in rows]


def values_of(world: dict[str, Any], output: Path) -> dict[str, Any]:
    values = run_config(world["sd"], world["pairs"], output).model_dump(mode="json", exclude_none=True)
    values["data"] = {"cache": str(output.parent / "cache")}
    return values


@pytest.fixture(scope="module")
def tuned(world: dict[str, Any]) -> TrainResult:
    """A short run in a folder whose name must be escaped."""
    values = values_of(world, world["folder"] / "a<b")
    rows = image_pairs(world["pairs"])
    return mmalign.train(values, pairs=rows, method={"name": "sft"}, trainer={"learning_rate": 0.1})


class Strict(HTMLParser):
    """Collects tags and text, and knows which tags were closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_importing_costs_nothing_and_offers_every_name() -> None:
    code = (
        "import sys, mmalign; heavy = {'torch', 'pydantic', 'yaml', 'numpy', 'PIL', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy; assert set(mmalign.__all__) <= set(dir(mmalign));"
        "[getattr(mmalign, name) for name in mmalign.__all__];"
        "from mmalign import train, Method, Reward; import mmalign.compare.run as run; assert run.compare;"
        "assert callable(mmalign.compare) and mmalign.compare.run is run;"
        "import inspect; assert 'systems' in inspect.signature(mmalign.compare).parameters"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mmalign.trian  # noqa: B018


def test_objects_train_the_same_run_as_files_and_again_goes_on(world: dict[str, Any], tmp_path: Path) -> None:
    by_files = train_run(run_config(world["sd"], world["pairs"], tmp_path / "files"))
    rows = image_pairs(world["pairs"])
    given = values_of(world, tmp_path / "objects")
    result = mmalign.train(given, pairs=rows)
    numbered = {int(number): loss for number, loss in losses(result.path).items()}
    assert [line["loss"] for line in result.metrics if "loss" in line] == [*numbered.values()]
    # The ids seed the noise, and a JSONL's records are numbered from 1, a parquet's rows from 0.
    with_ids = [row | {"id": str(number)} for number, row in enumerate(rows, start=1)]
    same = mmalign.train(given | {"output": str(tmp_path / "ids")}, pairs=with_ids)
    assert losses(same.path) == losses(by_files) != losses(result.path)

    (data,) = (same.path / "data").glob("pairs-*.parquet")
    assert mmalign.load_config(same.path / "config.yaml").data.pairs == str(data)
    saved = (same.path / "pytorch_lora_weights.safetensors").read_bytes()
    again = mmalign.train(given, "trainer.steps=6", pairs=with_ids, output=same.path)
    assert [*(same.path / "data").iterdir()] == [data] and set(losses(again.path)) == {1, 2, 3, 4, 5, 6}
    assert (same.path / "pytorch_lora_weights.safetensors").read_bytes() != saved
    assert {s: losses(again.path)[s] for s in (1, 2, 3, 4)} == losses(by_files)


def test_a_result_draws_and_shows_itself(tuned: TrainResult) -> None:
    result = tuned
    assert result.config.method_name == "sft" and [step for step, _ in result.curve()] == [1, 2, 3, 4]
    page = Strict(result._repr_html_())
    assert {"table", "svg", "polyline"} <= set(page.tags) and "b" not in page.tags
    assert any("a<b" in text for text in page.text)
    images = result.generate(["<b>red</b>", "star"], seeds=[3, 5], steps=2)
    assert len(images) == 4 and images.prompts == ["<b>red</b>"] * 2 + ["star"] * 2 and images.seeds == [3, 5] * 2
    shown = Strict(images._repr_html_())
    assert shown.tags.count("img") == 4 and "b" not in shown.tags and "<b>red</b>" in shown.text
    assert images._repr_png_().startswith(b"\x89PNG")
    assert isinstance(images[0], Image.Image) and images[1:3].seeds == [5, 3]


def test_drawing_is_what_the_command_line_draws(world: dict[str, Any], tmp_path: Path) -> None:
    from mmalign.cli import main

    assert main(["generate", world["sd"], "--prompts", "a red star", "--out", str(tmp_path), "--steps", "2"]) == 0
    generator = mmalign.load_generator(world["sd"], device="cpu")
    for model in (world["sd"], generator):
        (image,) = mmalign.generate(model, "a red star", steps=2)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "00000-0.png")))
    for options, message in [
        ({"device": "cdua"}, "device cdua: Expected one of"),
        ({"guidance": -1}, "guidance -1.0: must be a number of at least 0"),
        ({"solver": "dimm"}, "solver 'dimm'; allowed: ddim, dpm.*did you mean 'ddim'"),
        ({"seeds": [1, 1]}, "must be different whole numbers"),
        ({"adapter_scale": 0.5}, "adapter_scale 0.5 needs an adapter"),
    ]:
        with pytest.raises(UserError, match=message):
            mmalign.generate(world["sd"], "x", **options)
    with pytest.raises(UserError, match="belong to load_generator"):
        mmalign.generate(generator, "x", precision="bf16")


class Halved(SFT):
    """A method of this file: SFT whose loss is halved."""

    name = "halved"

    def loss(self, run: Any, batch: Any) -> LossOutput:
        return LossOutput(super().loss(run, batch).loss / 2)


def test_a_method_may_be_a_class(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = image_pairs(world["pairs"])
    plain = mmalign.train(values_of(world, tmp_path / "sft"), pairs=rows, method=SFT)
    assert plain.config.method_name == "sft"
    monkeypatch.setattr(methods, "_registered", {})
    local = type("Halved", (Halved,), {"__module__": "__main__"})  # as the cell of a notebook defines it
    mine = mmalign.train(values_of(world, tmp_path / "mine"), pairs=rows, method={"name": local})
    assert mine.config.method_name == "halved" and "name: halved" in (mine.path / "config.yaml").read_text()
    assert losses(mine.path)[1] == pytest.approx(losses(plain.path)[1] / 2)
    importable = mmalign.train(values_of(world, tmp_path / "importable"), pairs=rows, method=Halved)
    assert importable.config.method_name.endswith("test_api:Halved") and losses(importable.path) == losses(mine.path)


def test_prompts_and_rewards_as_objects(world: dict[str, Any], tmp_path: Path) -> None:
    values = values_of(world, tmp_path / "out") | {"method": {"name": "align_prop", "sampling_steps": 2}}
    look = {"prompts": ["a red circle"], "every": 4, "steps": 2, "rewards": [Brightness]}
    result = mmalign.train(values, prompts=["red", "blue", "green"], rewards=[Brightness], evaluate=look)
    assert result.config.rewards[0].name == "tiny_runs:Brightness"
    held = [json.loads(line)["prompt"] for line in Path(str(result.config.data.prompts)).read_text().splitlines()]
    assert held == ["red", "blue", "green"]
    assert len(result.curve("evaluation/tiny_runs:Brightness")) == 2 and len(result.curve("reward")) == 4
    again = mmalign.train({**values, "evaluate": look}, prompts=["red", "blue", "green"], rewards=[Brightness])
    assert again.config == result.config and again.metrics == result.metrics
    with pytest.raises(UserError, match=r"cannot hold a reward that is made already; .*'name': Brightness"):
        mmalign.train(values, prompts=["red"], rewards=[Brightness()])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": []}, "pairs: none are given; give dictionaries"),
        ({"pairs": [{"prompt": "x", "chosen": Image.new("RGB", (4, 4))}]}, "row 0: no column 'rejected'; found 'prom"),
        ({"pairs": [{"prompt": "x", "chosen": 3, "rejected": 3}]}, "pairs: row 0, chosen: no image .a int."),
        ({"pairs": [{"prompt": 3, "chosen": b"", "rejected": b""}]}, "pairs: row 0, prompt: a int; give text"),
        ({"pairs": ["x"]}, "a row is a str; give dictionaries"),
        ({"prompts": ["x"]}, "learns from pairs, not from prompts"),
        ({"pairs": "no-such.jsonl"}, "no-such.jsonl: no such file"),
        ({"pairs": "x", "trainer": {"stpes": 3}}, "the arguments: trainer.stpes: unknown key; did you mean 'steps'"),
        ({"trainer": {"steps": object()}}, "a object cannot stand in a config"),
    ],
)
def test_what_cannot_work_is_one_clear_line(
    world: dict[str, Any], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    values = values_of(world, tmp_path / "out")
    with pytest.raises(UserError, match=message) as error:
        mmalign.train(values, **given)
    assert "\n" not in str(error.value)


def test_labels_of_bytes_arrays_and_tensors_are_the_images_they_were(tmp_path: Path) -> None:
    from mmalign.api.objects import write_labels
    from mmalign.config.sections import DataConfig
    from mmalign.core.io.images import decode_image
    from mmalign.data.labels import read_labels

    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    tensor = torch.from_numpy(levels).permute(2, 0, 1).float() / 255
    kinds = [levels, tensor, Image.fromarray(levels)]
    rows = [{"prompt": f"p{i}", "image": kind, "label": i != 1} for i, kind in enumerate(kinds)]
    table = read_labels(write_labels(rows, tmp_path), DataConfig())
    assert table.labels() == [True, False, True] and table.prompts == ["p0", "p1", "p2"]
    assert all(torch.equal(decode_image(record.image), tensor) for record in table)
    rows[2]["label"] = "bad"
    assert read_labels(write_labels(rows, tmp_path), DataConfig()).labels() == [True, False, False]
    assert len(list((tmp_path / "data").glob("labels-*.parquet"))) == 2


def test_processes_that_write_the_same_objects_do_not_take_each_others_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process of a script that `accelerate launch` has started comes here at the same time."""
    from mmalign.api.objects import write_labels

    rows = [{"prompt": "p", "image": Image.new("RGB", (8, 8), "red"), "label": True}]
    replace, pid, others = Path.replace, os.getpid(), []

    def interrupted(self: Path, target: Path) -> Path:
        if not others:
            others.append("begun")
            monkeypatch.setattr(os, "getpid", lambda: pid + 1)
            others.append(write_labels(rows, tmp_path))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    written = write_labels(rows, tmp_path)
    assert others[1] == written and [path.name for path in (tmp_path / "data").iterdir()] == [Path(written).name]


def test_a_dataset_with_the_columns_of_pick_a_pic(tmp_path: Path) -> None:
    import datasets

    from mmalign.api.objects import write_pairs as write
    from mmalign.config.sections import DataConfig
    from mmalign.core.io.images import decode_image
    from mmalign.data.pairs import read_pairs

    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    columns = {"caption": ["a", "b"], "jpg_0": pictures, "jpg_1": pictures[::-1], "label_0": [0, 1], "label_1": [1, 0]}
    features = datasets.Features(
        {"caption": datasets.Value("string"), "label_0": datasets.Value("int64"), "label_1": datasets.Value("int64")}
        | {name: datasets.Image() for name in ("jpg_0", "jpg_1")}
    )
    table = read_pairs(write(datasets.Dataset.from_dict(columns, features), tmp_path), DataConfig())
    assert [record.prompt for record in table] == ["a", "b"]
    colours = [decode_image(record.chosen)[:, 0, 0].tolist() for record in table]
    assert colours == [[0.0, 0.0, 1.0]] * 2  # blue is the second of the first row, and the first of the second


def test_answers_about_frames_are_pairs_with_videos(tmp_path: Path) -> None:
    from mmalign.api.objects import write_pairs as write
    from mmalign.config.sections import DataConfig
    from mmalign.core.io.decode import decode_video
    from mmalign.data.vlm_pairs import read_vlm_pairs

    frames = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
    rows = [
        {"prompt": "what?", "chosen": "this", "rejected": "that", "video": frames, "fps": 2, "difficulty": 4},
        {"prompt": "who?", "chosen": "me", "rejected": "you", "image": Image.new("RGB", (8, 8))},
    ]
    first, second = read_vlm_pairs(write(rows, tmp_path, answers=True), DataConfig())
    assert (first.kind, first.fps, first.difficulty, second.kind) == ("video", 2.0, 4, "image")
    decoded, rate = decode_video(first.media[0], rate=first.fps)
    assert rate == 2.0 and torch.equal(decoded, (frames * 255).round().to(torch.uint8))


class TestScore:
    LEVELS = (0, 51, 255)

    def images(self) -> list[Image.Image]:
        return [Image.new("RGB", (4, 4), (level,) * 3) for level in self.LEVELS]

    def test_objects_files_and_tensors_have_the_same_scores(self, tmp_path: Path) -> None:
        expected = [0.0, 0.2, 1.0]
        pictures = self.images()
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / f"{number}.png")
        tensor = torch.tensor(expected).view(3, 1, 1, 1).expand(3, 3, 4, 4)
        ways = [pictures, tensor, str(tmp_path), sorted(tmp_path.glob("*.png")), [np.asarray(p) for p in pictures]]
        for images in ways:
            for reward in (Brightness, Brightness(), "tiny_runs:Brightness"):
                scores = mmalign.score(images, rewards=reward)
                assert scores[scores.columns[0]] == pytest.approx(expected, abs=1e-6)
        kept = mmalign.score(tmp_path, rewards=Brightness, output=tmp_path / "scores.csv")
        assert kept[0]["id"] == str(tmp_path / "0.png") and (tmp_path / "scores.csv").is_file()

    def test_a_table_with_weights_a_summary_and_escaped_prompts(self) -> None:
        rewards = [{"name": Brightness, "label": "light", "weight": 2}, {"name": Brightness, "label": "again"}]
        scores = mmalign.score(self.images(), ["<i>a</i>", "b", "c"], rewards)
        assert scores.columns == ["light", "again", "total"]
        assert scores["total"] == pytest.approx([0.0, 0.6, 3.0], abs=1e-6)  # a reward without a weight counts once
        assert scores.summary["light"]["mean"] == pytest.approx(0.4) and scores.summary["light"]["missing"] == 0
        assert list(scores)[1]["prompt"] == "b" and len(scores[:2]) == 2
        page = Strict(scores._repr_html_())
        assert "i" not in page.tags and "<i>a</i>" in page.text
        assert scores.to_pandas()["light"].tolist() == scores["light"]

    def test_what_cannot_be_scored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry._LOOKUP, "_registered", {})
        needy = type("Needy", (Brightness,), {"name": "needy", "needs": {"prompts"}, "__module__": "__main__"})
        for images, prompts, reward, message in [
            (self.images(), None, needy, "3 of 3 inputs have no prompt, and reward 'needy' needs one"),
            (self.images(), ["a"], Brightness, "prompts: 1 are given for 3 images"),
            ([], None, Brightness, "images: none are given"),
            ([b"nothing"], None, Brightness, "image 0: unreadable image .*; mend it, or give skip_bad=True"),
            ([3], None, Brightness, "image 0: .*no image"),
            (self.images(), None, [Brightness, Brightness], "occurs more than once"),
            (self.images(), None, [], "rewards: none are given"),
        ]:
            with pytest.raises(UserError, match=message):
                mmalign.score(images, prompts, reward)
        scores = mmalign.score([b"nothing", *self.images()], rewards=Brightness, skip_bad=True)
        assert scores[0]["brightness"] is None and "unreadable" in scores[0]["error"]
        assert scores.summary["brightness"]["missing"] == 1
        with pytest.raises(UserError, match="output: keeps the scores of files"):
            mmalign.score(self.images(), rewards=Brightness, output="x.csv")
        with pytest.raises(KeyError, match="no column 'clip'; there are brightness"):
            scores["clip"]


def test_compare_by_name_shows_the_table_of_the_report(
    world: dict[str, Any], tuned: TrainResult, tmp_path: Path
) -> None:
    result = shutil.copytree(tuned, tmp_path / "sft")
    options: dict[str, Any] = {"prompts": ["a <b>red</b> star", "two"], "rewards": [Brightness], "steps": 2}
    outcome = mmalign.compare(
        {"base": world["sd"], "sft": tuned}, "seeds=[0]", output=tmp_path / "compare", resamples=100, **options
    )
    document = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert json.loads(json.dumps(outcome.results, default=str)) == document and outcome.report.is_file()
    base, sft = outcome.table
    assert (base["system"], sft["system"], base["reward"]) == ("base", "sft", "brightness")
    numbers = document["systems"]["sft"]["rewards"]["brightness"]
    assert sft["mean [95 % CI]"].startswith(f"{numbers['mean']:.{document['rewards'][base['reward']]['digits']}f}")
    assert document["prompts"] == 2 and document["seeds"] == [0] and len(outcome.verdicts) == 1
    assert "sft" in Strict(outcome._repr_html_()).text
    again = mmalign.compare([world["sd"], result], output=tmp_path / "more", resamples=100, seeds=[0], **options)
    assert list(again.results["systems"]) == ["sd", "sft"]
    for systems, message in [
        ({"base": world["sd"]}, "systems: only 'base'; give a second one"),
        ("no-config", "systems: 'no-config' is no config of a comparison"),
        ({"a": world["sd"], "b": {"modle": "x"}}, "unknown key; did you mean 'model'"),
    ]:
        with pytest.raises(UserError, match=message):
            mmalign.compare(systems, output=tmp_path / "x", **options)
