"""`--image-size` of generate, pairs sample and compare, for U-Nets, flow models and pipelines outside our families."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from flow_tools import Models, noise
from PIL import Image
from tiny_models import build_tiny_sd, build_tiny_sdxl

import mmalign
from mmalign.cli import main
from mmalign.core.errors import UserError
from pipelines import load_drawer, sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    found = Models(tmp_path_factory.mktemp("sizes"))
    found["sd"], found["sdxl"] = build_tiny_sd(found.folder / "sd"), build_tiny_sdxl(found.folder / "sdxl")
    return found


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux2"])
def test_images_have_the_size_asked_for(models: Models, tmp_path: Path, name: str) -> None:
    command = ["generate", models[name], "--prompts", "a red circle", "--steps", "1", "--guidance", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--image-size", "24"]) == 0
    assert Image.open(tmp_path / "out" / "00000-0.png").size == (24, 24)
    assert json.loads((tmp_path / "out" / "generate.json").read_text())["image_size"] == 24
    # A folder holds images of one size.
    assert main([*command, "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(("name", "size", "nearest"), [("sd", 23, 24), ("flux2", 26, 24), ("sd3", 64, 32)])
def test_sizes_that_do_not_fit_name_the_nearest(
    models: Models, tmp_path: Path, name: str, size: int, nearest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", models[name], "--prompts", "a red circle", "--image-size", str(size)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert f"not {size} x {size}; the nearest size is {nearest} x {nearest}" in error[-1]


def test_sdxl_is_told_the_size(models: Models) -> None:
    """Its size conditioning is that of the images asked for, and the samples are those of latents of that shape."""
    generator, own = (
        load_drawer(models["sdxl"], device="cpu", image_size=24),
        load_drawer(models["sdxl"], device="cpu"),
    )
    cond, x = generator.encode_prompts(["a star"]), noise(1, 4, 12, 12)
    assert cond.time_ids.tolist() == [[24, 24, 0, 0, 24, 24]]
    asked = own.encode_prompts(["a star"])
    asked.time_ids = cond.time_ids
    drawn = sample(generator, cond, steps=2, guidance=1.0, latents=x).latents
    assert torch.equal(drawn, sample(own, asked, steps=2, guidance=1.0, latents=x).latents)
    assert generator.latent_shape == (4, 12, 12) and generator.image_size == 24
    assert generator.text_id != own.text_id  # a cache of conditionings holds the size too


def test_shifts_by_size_follow(models: Models) -> None:
    small, large = (load_drawer(models["flux"], device="cpu", image_size=side) for side in (16, 64))
    assert small.schedule(4).levels[1] < large.schedule(4).levels[1]


def test_pairs_and_comparisons_take_it(models: Models, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    drawing = ["--prompts", str(prompts), "--steps", "1", "--guidance", "1", "--image-size", "24"]
    assert main(["pairs", "sample", models["sd"], *drawing, "--out", str(tmp_path / "pairs")]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "pairs" / "images.parquet")
    assert Image.open(io.BytesIO(table["image"][0].as_py())).size == (24, 24)
    compared = ["compare", models["sd"], models["sd3"], *drawing, "--rewards", "tiny_runs:Brightness"]
    assert main([*compared, "--out", str(tmp_path / "compare")]) == 0
    pictures = list((tmp_path / "compare").rglob("0000-0.png"))
    assert len(pictures) == 2 and {Image.open(one).size for one in pictures} == {(24, 24)}
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert results["settings"]["image_size"] == 24
    assert "24 pixels a side" in (tmp_path / "compare" / "report.html").read_text()


def test_python_takes_it(models: Models) -> None:
    images = mmalign.generate(models["sd"], "a star", steps=1, image_size=24)
    assert images[0].size == (24, 24)
    with pytest.raises(UserError, match="image_size 0: must be a number of pixels above 0"):
        mmalign.generate(models["sd"], "a star", image_size=0)
