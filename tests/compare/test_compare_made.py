"""Folders of images made elsewhere as systems of a comparison: how they are matched, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS

from mmalign.cli import main
from mmalign.compare.config import make_compare_config
from mmalign.compare.images.made import as_system, match_images
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png

PROMPTS = ["a ring", "a star", "a ring"]


@pytest.fixture
def reward() -> str:
    return BRIGHTNESS


def write(folder: Path, levels: dict[str, int]) -> Path:
    for name, level in levels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(torch.full((3, 8, 8), level / 255)))
    return folder


def matched(folder: Path, seeds: list[int], prompts: list[str] = PROMPTS) -> list[list[str]]:
    images = match_images(str(folder), prompts, seeds)
    return [
        [images.path(index, seed).relative_to(folder).as_posix() for seed in seeds] for index in range(len(prompts))
    ]


@pytest.mark.parametrize(
    ("names", "seeds", "expected"),
    [
        (["0000-5.png", "0000-0.png", "0001-0.png", "0001-5.png"], [5, 0], [["0000-5.png", "0000-0.png"],
                                                                           ["0001-5.png", "0001-0.png"]]),
        (["0.png", "1.jpg"], [3], [["0.png"], ["1.jpg"]]),
        (["img_1.png", "img_2.png"], [0], [["img_1.png"], ["img_2.png"]]),
        (["00000/samples/9.png", "00000/samples/10.png", "00001/samples/9.png", "00001/samples/10.png"], [0, 1],
         [["00000/samples/9.png", "00000/samples/10.png"], ["00001/samples/9.png", "00001/samples/10.png"]]),
        (["0/b.png", "0/a.png", "1/b.png", "1/a.png"], [7, 8], [["0/a.png", "0/b.png"], ["1/a.png", "1/b.png"]]),
        (["0-1.png", "0-2.png", "1-1.png", "1-2.png", "2-1.png"], [0], [["0-1.png"], ["1-1.png"]]),
    ],
)  # fmt: skip
def test_names_hold_the_prompt_and_the_seed(tmp_path, names, seeds, expected):
    folder = write(tmp_path / "made", dict.fromkeys(names, 9))
    assert matched(folder, seeds, ["a", "b"]) == expected


def test_metadata_and_captions_match_by_prompt(tmp_path, capsys):
    folder = write(tmp_path / "made", {"x.png": 1, "y.png": 2, "z.png": 3, "other.png": 4})
    rows = [("x.png", "a star"), ("y.png", "a ring"), ("z.png", "a ring"), ("other.png", "a cube")]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": a, "prompt": b}) for a, b in rows))
    assert matched(folder, [0]) == [["y.png"], ["x.png"], ["z.png"]]  # the prompt that repeats takes the next image
    assert "1 of 4 images belong to no prompt and seed" in capsys.readouterr().err
    beside = write(tmp_path / "beside", {"x.png": 1, "y.png": 2})
    (beside / "x.txt").write_text("b")
    with pytest.raises(UserError, match="y.png: has no prompt, and 1 images beside it have one"):
        matched(beside, [0], ["a", "b"])
    (beside / "y.caption").write_text("a\n")
    assert matched(beside, [0], ["a", "b"]) == [["y.png"], ["x.png"]]


def test_a_missing_image_is_named(tmp_path):
    folder = write(tmp_path / "made", {"0000-0.png": 1, "0000-1.png": 1, "0001-0.png": 1, "0002-0.png": 1})
    with pytest.raises(UserError, match=r"2 of 6 images are missing, the first for prompt 1 \('a star'\) and seed 1$"):
        matched(folder, [0, 1])
    single = write(tmp_path / "single", {"0.png": 1, "1.png": 1, "2.png": 1})
    with pytest.raises(UserError, match="and seed 1; it has 1 for each prompt: compare fewer seeds"):
        matched(single, [0, 1])
    with pytest.raises(UserError, match="photo.png: cannot be matched with a prompt; name it by the prompt's number"):
        matched(write(tmp_path / "named", {"photo.png": 1}), [0])
    with pytest.raises(UserError, match="no such file or directory"):
        match_images(str(tmp_path / "nothing"), PROMPTS, [0])


def test_what_a_folder_of_images_cannot_have():
    base = {"name": "b", "images": "x"}
    values = {"prompts": "p", "rewards": ["clip"], "output": "o"}
    for system, message in (
        (base | {"guidance": 3.0}, "'b' has images, and guidance and adapter_scale change none"),
        (base | {"model": "m"}, "'b' has both model and images"),
        ({"name": "b"}, "'b' has neither model nor train"),
    ):
        with pytest.raises(UserError, match=message):
            make_compare_config(systems=[system, {"name": "c", "images": "y"}], **values)
    control = {"guidances": [1.0, 2.0], "prompts": "p", "rewards": ["clip"]}
    with pytest.raises(UserError, match="guidance_control: the baseline 'b' is a folder"):
        make_compare_config(systems=[base, {"name": "c", "model": "y"}], guidance_control=control, **values)


def test_models_and_images_are_told_apart(tmp_path):
    model = Path(build_tiny_sd(tmp_path / "sd", vae="tiny"))
    write(model, {"sample.png": 1})
    made = write(tmp_path / "made", {"0.png": 1})
    assert as_system("m", str(model)) == {"name": "m", "model": str(model)}
    assert as_system("m", str(made)) == {"name": "m", "images": str(made)}
    assert as_system("m", "org/name") == {"name": "m", "model": "org/name"}


def test_folders_are_compared_with_each_other_and_with_a_model(tmp_path, reward, capsys):
    (tmp_path / "p.txt").write_text("a ring\na star\n")
    dark = write(tmp_path / "dark", {"0-0.png": 20, "0-1.png": 40, "1-0.png": 60, "1-1.png": 80})
    light = write(tmp_path / "light", {"0/a.png": 120, "0/b.png": 140, "1/a.png": 160, "1/b.png": 180})
    model = build_tiny_sd(tmp_path / "sd", vae="tiny")
    command = ["compare", str(dark), str(light), model, "--prompts", str(tmp_path / "p.txt"), "--rewards", reward]
    command += ["--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    versus = results["systems"]["light"]["versus_baseline"][reward]
    assert versus["delta"] == pytest.approx(100 / 255, abs=1e-6) and versus["win_rate"] == 1.0
    assert results["systems"]["dark"]["rewards"][reward]["mean"] == pytest.approx(50 / 255, abs=1e-6)
    assert (results["systems"]["light"]["model"], results["systems"]["light"]["guidance"]) == (str(light), None)
    assert [entry.name for entry in (tmp_path / "out" / "images").iterdir()] == ["sd"]
    assert main(["compare", str(tmp_path / "out" / "config.yaml")]) == 0  # the config that was written says the same
    (light / "1" / "b.png").unlink()
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "light: 1 of 4 images are missing, the first for prompt 1 ('a star') and seed 1" in error
