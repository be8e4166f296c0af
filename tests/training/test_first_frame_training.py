"""Training image-to-video models on pairs and on prompts with first frames, end to end on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BuiltModels
from tiny_motion import build_tiny_cogvideox
from tiny_runs import losses, run_config
from tiny_videos import GEOMETRY, build_tiny_wan

from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.core.io.video_files import write_video
from mmalign.training.train import train
from pipelines import Generator, VideoOptions, load_generator
from pipelines.families.cogvideox_image import CogVideoXFromImage
from pipelines.families.wan import Wan
from pipelines.families.wan_image import WanFromImageWithClip

MOTION = "tiny_runs:Motion"
FLOW = {"text_length": 32}
DPO = {"name": "diffusion_dpo", "beta": 20.0}
NFT = {"name": "nft", "images_per_prompt": 2, "sampling_steps": 3, "guidance": 2.0}
BUILDERS: dict[str, Callable[[Path], str]] = {
    "text": build_tiny_wan,
    "a14b": lambda path: build_tiny_wan(path, experts=True, from_image=True),
    "clip": lambda path: build_tiny_wan(path, from_image=True, clip=True),
    "ti2v": lambda path: build_tiny_wan(path, per_token=True),
    "cogvideox": lambda path: build_tiny_cogvideox(path, from_image=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> BuiltModels:
    return BuiltModels(tmp_path_factory.mktemp("first"), BUILDERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of nine frames at eight a second that share the first, which is grey, and two prompts with images."""
    folder = tmp_path_factory.mktemp("data")
    pairs, prompts = [], []
    for index, level in enumerate((60, 180)):
        for seed, side in enumerate(("w", "l")):
            source = torch.Generator().manual_seed(10 * index + seed)
            levels = torch.randint(0, 256, (9, 3, 32, 32), generator=source, dtype=torch.uint8)
            levels[0] = level
            write_video(folder / f"{index}-{side}.mkv", levels, 8.0)
        pairs.append({"prompt": f"{index} cats", "chosen": f"{index}-w.mkv", "rejected": f"{index}-l.mkv"})
        (folder / f"{index}.png").write_bytes(encode_png(torch.full((3, 32, 32), level / 255)))
        prompts.append({"prompt": "a cat", "image": f"{index}.png"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "one.jsonl").write_text("\n".join(map(json.dumps, [prompts[0], {"prompt": "a cat"}])))
    (folder / "texts.txt").write_text("a cat\na dog\n")
    return folder


def config(model: str, folder: Path, output: Path, method: dict[str, Any], name: str, **changes: Any) -> Any:
    side = 32 if name == "ti2v" else 16
    video = {**GEOMETRY, "height": side, "width": side, "frames": 9 if name == "cogvideox" else 5}
    given: dict[str, Any] = {"video": video, "steps": 1, "checkpoint_every": 1, "data": {}}
    given |= {} if name == "cogvideox" else {"flow": FLOW}
    if method["name"] == "nft":
        given |= {"data": {"pairs": None, "prompts": str(folder / "prompts.jsonl")}, "rewards": [{"name": MOTION}]}
    sections = {**given, **changes, "data": {**given["data"], **changes.get("data", {})}}
    return run_config(model, folder / "pairs.jsonl", output, method, **sections)


class Seen(list[torch.Tensor]):
    """The first frames that a family's predictions are given, each row once a call."""

    def spy(self, monkeypatch: pytest.MonkeyPatch, family: type[Generator]) -> None:
        predict = family.predict

        def spied(generator: Any, x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
            if cond.first_frame is not None:
                self.extend(cond.first_frame.detach().float().cpu())
            return predict(generator, x_t, t, cond)

        monkeypatch.setattr(family, "predict", spied)


def match(row: torch.Tensor, expected: torch.Tensor) -> int:
    """Return which of the rows expected this is, -1 if none."""
    return next((n for n, one in enumerate(expected) if torch.allclose(row, one, rtol=1e-4, atol=1e-4)), -1)


@pytest.mark.parametrize(
    ("name", "method", "family"),
    [
        ("a14b", DPO, Wan),
        pytest.param("clip", DPO, WanFromImageWithClip, marks=pytest.mark.slow),
        ("cogvideox", DPO, CogVideoXFromImage),
        pytest.param("a14b", {"name": "sft"}, Wan, marks=pytest.mark.slow),
        ("clip", NFT, WanFromImageWithClip),
        pytest.param("cogvideox", NFT, CogVideoXFromImage, marks=pytest.mark.slow),
        pytest.param("ti2v", NFT, Wan, marks=pytest.mark.slow),
    ],
    ids=lambda one: one["name"] if isinstance(one, dict) else one if isinstance(one, str) else "",
)
def test_a_step_is_given_the_first_frames(
    models: BuiltModels,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: dict[str, Any],
    family: Any,
) -> None:
    seen = Seen()
    seen.spy(monkeypatch, family)
    evaluate = {"prompts": str(data / "prompts.jsonl"), "every": 1, "rewards": [MOTION], "steps": 2, "guidance": 2.0}
    asked = {"first_frame": True} if name == "ti2v" else {}
    run = config(models[name], data, tmp_path / "run", method, name, data=asked, evaluate=evaluate)
    output = train(run)
    assert set(losses(output)) == {1} and set(losses(output, f"evaluation/{MOTION}")) == {0, 1}
    model = load_generator(models[name], device="cpu", video=VideoOptions(**run.video.model_dump()))
    frames = torch.tensor([60, 180]).reshape(2, 1, 1, 1).expand(2, *model.media_shape[1:]) / 255
    expected = model.encode_first_frames(frames)["first_frame"]
    assert {match(row, expected) for row in seen} == {0, 1}
    needed = name != "ti2v"
    card = (output / "README.md").read_text()
    assert ('pipe(image, "a prompt").frames[0]' in card) == ("pipeline_tag: image-to-video" in card) == needed
    trained = load_generator(str(output), device="cpu", video=VideoOptions(**run.video.model_dump()))
    assert any(bool(one.abs().max() > 0) for one in trained.trainable_parameters())


@pytest.mark.parametrize(
    ("name", "method", "changes", "said"),
    [
        ("a14b", NFT, {"data": {"prompts": "texts.txt"}}, "2 of 2 prompts have none; give data.prompts in a table"),
        ("a14b", NFT, {"data": {"prompts": "one.jsonl"}}, "1 of 2 prompts have none; give data.prompts in a table"),
        ("a14b", DPO, {"evaluate": "texts.txt"}, "2 of 2 prompts have none; give evaluate.prompts in a table"),
        ("ti2v", DPO, {"data": {"first_frame": True}, "evaluate": "one.jsonl"}, "1 of 2 prompts have none; give eval"),
        (
            "text",
            DPO,
            {"data": {"first_frame": True}},
            r"data.first_frame: model .* \('wan'\) is not made of an image",
        ),
        ("clip", DPO, {"data": {"first_frame": False}}, "data.first_frame false: .* makes no videos without one"),
    ],
)
def test_a_model_and_data_that_do_not_agree_are_one_line_before_weights_are_read(
    models: BuiltModels,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: dict[str, Any],
    changes: dict[str, Any],
    said: str,
) -> None:
    given = dict(changes)
    if "evaluate" in given:
        given["evaluate"] = {"prompts": str(data / given["evaluate"]), "every": 1, "rewards": [MOTION]}
    if "prompts" in given.get("data", {}):
        given["data"] = {"prompts": str(data / given["data"]["prompts"])}
    run = config(models[name], data, tmp_path / "run", method, name, **given)
    monkeypatch.setattr("mmalign.training.tasks.image.load_generator", None)
    with pytest.raises(UserError, match=said) as caught:
        train(run)
    assert "\n" not in str(caught.value)


def test_what_a_model_of_text_alone_does_not_use_is_said(
    models: BuiltModels, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) | {"first_frame": "0.png"} for line in (data / "pairs.jsonl").read_text().splitlines()]
    (data / "with.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(config(models["text"], data, tmp_path / "run", DPO, "text", data={"pairs": str(data / "with.jsonl")}))
    assert "the model is not given the first frames in it (data.first_frame)" in capsys.readouterr().err
