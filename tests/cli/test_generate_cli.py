"""`mmalign generate`, the loop under it, and grids: right images, batch-independent, resumable, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd

from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.core.io.grid import image_grid, labelled_grid
from mmalign.core.io.images import decode_image
from mmalign.data.building.generation import generate_images
from mmalign.data.prompts import Prompt
from pipelines import load_generator, sample


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("model") / "sd", vae="tiny")


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = load_generator(model)
    generator.add_adapter(rank=2, seed=1)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(0.3)
    path = tmp_path_factory.mktemp("adapter")
    generator.save_lora(path)
    return str(path)


def generate(model: str, out: Path, *options: str, prompts: str = "red circle") -> int:
    return main(["generate", model, "--prompts", prompts, "--out", str(out), "--steps", "2", *options])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_image_depends_on_prompt_and_seed_not_on_the_batch(model):
    generator = load_generator(model)
    prompts = ["red circle", "star", "red circle", "two"]
    done: list[int] = []
    options = dict(steps=3, guidance=4.0, eta=0.5)
    images = list(generate_images(generator, prompts, seeds=[3, 9], batch_size=3, progress=done.append, **options))
    assert [(item.prompt_index, item.seed) for item in images] == [(i, s) for i in range(4) for s in (3, 9)]
    assert done == [3, 3, 2]
    assert images[0].image.shape == (3, 16, 16) and 0 <= images[0].image.min() <= images[0].image.max() <= 1
    for item in images[1::3]:
        cond = generator.encode_prompts([prompts[item.prompt_index]])
        alone = generator.decode(sample(generator, cond, seeds=[item.seed], **options).latents)[0]
        torch.testing.assert_close(item.image, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(images[0].image, images[4].image, atol=2e-5, rtol=0)
    assert float((images[0].image - images[2].image).abs().max()) > 1e-3


def test_each_prompt_is_encoded_once_and_seeds_may_differ_by_prompt(model):
    generator = load_generator(model)
    encoded: list[str] = []
    encode = generator.encode_prompts
    generator.encode_prompts = lambda texts: encoded.extend(t for t in texts if t) or encode(texts)
    prompts = [Prompt("red"), Prompt("star"), Prompt("red")]
    images = list(generate_images(generator, prompts, seeds=[[1, 2], [], [5]], steps=1, batch_size=1))
    assert [(item.prompt_index, item.seed) for item in images] == [(0, 1), (0, 2), (2, 5)]
    assert encoded == ["red"]
    with pytest.raises(UserError, match="1 sequences of seeds for 3 prompts"):
        generate_images(generator, prompts, seeds=[[1]])


def test_writes_images_and_metadata(model, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("Prompts,Category\nred circle,Colors\nblue star,Other\n")
    assert generate(model, tmp_path / "out", "--seeds", "0,4", "--grid", prompts=str(tmp_path / "p.csv")) == 0
    assert "4 images (4 new) of 2 prompts" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[2] == {"file": "00001-0.png", "prompt": "blue star", "category": "Other", "seed": 0}
    assert [row["file"] for row in rows] == ["00000-0.png", "00000-4.png", "00001-0.png", "00001-4.png"]
    expected = next(generate_images(load_generator(model), ["blue star"], seeds=[4], steps=2)).image
    found = decode_image(tmp_path / "out" / "00001-4.png")
    assert float((found - expected).abs().max()) < 0.5 / 255 + 1e-4
    assert Image.open(tmp_path / "out" / "grid.png").width > 2 * 96


def test_resumes_with_what_is_missing_and_equals_an_uninterrupted_run(model, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("red circle\nblue star\ngreen square\n")
    for out in ("whole", "parts"):
        assert generate(model, tmp_path / out, prompts=str(prompts)) == 0
    part = tmp_path / "parts"
    (part / "00001-0.png").unlink()
    lines = (part / "metadata.jsonl").read_text().splitlines(keepends=True)
    (part / "metadata.jsonl").write_text(lines[0] + lines[1] + lines[2][:20])  # killed in the middle of a line
    kept = (part / "00000-0.png").stat().st_mtime_ns
    capsys.readouterr()
    assert generate(model, part, prompts=str(prompts)) == 0
    assert "3 images (2 new)" in capsys.readouterr().out
    assert (part / "00000-0.png").stat().st_mtime_ns == kept
    for name in ("00001-0.png", "00002-0.png"):
        assert np.abs(pixels(part / name) - pixels(tmp_path / "whole" / name)).max() <= 1
    assert (part / "metadata.jsonl").read_bytes() == (tmp_path / "whole" / "metadata.jsonl").read_bytes()


def test_a_failed_attempt_does_not_bind_the_next(model, tmp_path, capsys):
    assert generate(model, tmp_path, "--steps", "2000") == 2
    assert "steps must lie in 1..1000, got 2000" in capsys.readouterr().err
    assert generate(model, tmp_path) == 0


def test_does_not_mix_images_of_different_making(model, tmp_path, capsys):
    assert generate(model, tmp_path) == 0
    assert generate(model, tmp_path, "--guidance", "3") == 2
    assert "guidance 7.5 -> 3.0" in capsys.readouterr().err
    assert generate(model, tmp_path, prompts="blue star") == 2
    assert "prompt 0 'red circle' -> 'blue star'" in capsys.readouterr().err


def test_adapter_directory_and_scale(model, adapter, tmp_path, capsys):
    assert generate(model, tmp_path / "base") == 0
    assert generate(adapter, tmp_path / "tuned") == 0
    assert generate(model, tmp_path / "added", "--adapter", adapter) == 0
    assert generate(model, tmp_path / "off", "--adapter", adapter, "--adapter-scale", "0") == 0
    images = {name: pixels(tmp_path / name / "00000-0.png") for name in ("base", "tuned", "added", "off")}
    assert (images["tuned"] == images["added"]).all() and (images["off"] == images["base"]).all()
    assert np.abs(images["tuned"] - images["base"]).max() > 3
    assert generate(model, tmp_path / "none", "--adapter-scale", "0.5") == 2
    error = capsys.readouterr().err
    assert f"--adapter-scale 0.5 needs an adapter, and {model} is a whole model without one" in error
    assert "give --adapter PATH or a MODEL that is one, or leave the scale out" in error
    assert generate(adapter, tmp_path / "tuned", "--adapter-scale", "0.5") == 2
    assert "adapter_scale 1.0 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("drawbnech", [], "for a prompt of one word write --prompts text:drawbnech"),
        ("no/such.csv", [], "no such file"),
        ("text:", [], "no prompt follows"),
        ("a ring", ["--seeds", "1,x"], "'1,x' is no list of whole numbers"),
        ("a ring", ["--seeds", "1,1"], "seeds must be different"),
        ("a ring", ["--steps", "0"], "'0' is not a whole number above 0"),
        ("a ring", ["--eta", "2"], "must lie between 0 and 1"),
        ("a ring", ["--guidance", "-1"], "--guidance -1.0: must be a number of at least 0"),
        ("a ring", ["--guidance", "nan"], "--guidance nan: must be a number of at least 0"),
        ("a ring", ["--adapter-scale", "-1"], "--adapter-scale -1.0: must be a number of at least 0"),
        ("a ring", ["--adapter-scale", "inf"], "--adapter-scale inf: must be a number of at least 0"),
        ("a ring", ["--precision", "fp16"], "--precision: fp16 needs a GPU"),
        ("a ring", ["--eta", "1", "--solver", "dpm++"], "needs --solver ddim"),
        ("a ring", ["--adapter", "no/adapter"], "no such file or directory"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(model, tmp_path, capsys, monkeypatch, prompts, options, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["generate", model, "--prompts", prompts, "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "cat.png", "text": "a cat"}\n'),
        ("metadata.jsonl", '{"file": "cat.png", "prompt": "a cat"}\n'),
        ("metadata.jsonl", '["00000-0.png"]\n'),
        ("metadata.jsonl", "17\n"),
        ("generate.json", "[1]"),
        ("generate.json", "{"),
    ],
)
def test_what_somebody_else_wrote_is_not_written_over(model, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert generate(model, tmp_path) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and "choose another --out" in error and error.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_missing_model_and_one_word_prompt(model, tmp_path, capsys):
    assert main(["generate", str(tmp_path / "gone"), "--prompts", "a ring", "--out", str(tmp_path / "o")]) == 2
    assert "no such file or directory" in capsys.readouterr().err
    assert generate(model, tmp_path / "o", prompts="text:star") == 0
    assert json.loads((tmp_path / "o" / "metadata.jsonl").read_text())["prompt"] == "star"


def test_grid_places_images_and_labels():
    red, blue = (torch.zeros(3, 8, 8).index_fill_(0, torch.tensor([c]), 1.0) for c in (0, 2))
    grid = image_grid([[red, None], [red, blue]], row_labels=["a", "b"], column_labels=["x", "y"], cell=16)
    width, height = grid.size
    assert grid.getpixel((width - 8, height - 8)) == (0, 0, 255)
    assert grid.getpixel((width - 28, height - 28)) == (255, 0, 0)
    assert grid.getpixel((width - 8, height - 28)) == (255, 255, 255)
    assert np.asarray(grid)[:, :100].min() < 128  # the labels are there
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        image_grid([[red], [red]], row_labels=["a"])
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([[None]])
    several = labelled_grid([Image.new("RGB", (8, 8), "red")] * 5, ["a long label that has to wrap"] * 5, columns=2)
    assert several.height > 3 * 96 and several.width < 3 * 96
