"""`mmalign generate` with a first frame: given by --image or by the prompts, and refused where it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from tiny_videos import build_tiny_wan

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.hashing import content_key
from mmalign.core.io.images import encode_png
from mmalign.data.building.sampling import SCHEMA, SampleSettings, prompt_id
from mmalign.data.pairs import read_pairs
from pipelines import VideoOptions, load_generator, sample

SIZE = ("--frames", "5", "--height", "16", "--width", "16")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan", from_image=True, clip=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "text")


def picture(path: Path, level: float) -> Path:
    path.write_bytes(encode_png(torch.full((3, 16, 32), level)))
    return path


def generate(model: str, out: Path, prompts: str, *options: str) -> int:
    given = ("--prompts", prompts, "--out", str(out), "--steps", "2", "--guidance", "2", *SIZE)
    return main(["generate", model, *given, *options])


def drawn(model: str, level: float) -> torch.Tensor:
    """Return what the model draws of an image of one level, by the sampler itself."""
    generator = load_generator(model, device="cpu", video=VideoOptions(16, 16, 5))
    frame = torch.full((1, 3, 16, 16), round(level * 255) / 255)
    cond = generator.with_first_frame(generator.encode_prompts(["a cat"]), frame)
    with torch.no_grad():
        return generator.decode(sample(generator, cond, steps=2, guidance=2.0, seeds=[0]).latents)[0]


def error(path: Path, expected: torch.Tensor) -> float:
    """Return the mean difference in brightness of a file's frames, which have their colours at half the resolution."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    luma = torch.tensor([0.299, 0.587, 0.114])
    found = torch.stack(frames).permute(0, 3, 1, 2) / 255
    return float(torch.einsum("fchw,c->fhw", found - expected, luma).abs().mean())


def test_videos_start_from_the_image_given_or_from_that_of_their_prompt(
    wan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {level: picture(tmp_path / f"{level}.png", level) for level in (0.1, 0.9)}
    expected = {level: drawn(wan, level) for level in images}
    out = tmp_path / "one"
    assert generate(wan, out, "text:a cat", "--image", str(images[0.9])) == 0
    print("ERR", [error(out / "00000-0.mp4", expected[level]) for level in expected])
    assert error(out / "00000-0.mp4", expected[0.9]) < error(out / "00000-0.mp4", expected[0.1]) / 2
    row = json.loads((out / "metadata.jsonl").read_text())
    assert row["first_frame"] == str(images[0.9]) and len(row["first_frame_id"]) == 32
    assert generate(wan, out, "text:a cat", "--image", str(images[0.9])) == 0 and "(0 new)" in capsys.readouterr().out
    assert generate(wan, out, "text:a cat", "--image", str(images[0.1])) == 2
    assert "(first frame of prompt 0 " in capsys.readouterr().err
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,first_frame\na cat,0.1.png\na cat,0.9.png\n")
    assert generate(wan, tmp_path / "two", str(table)) == 0
    for index, (own, other) in enumerate(((0.1, 0.9), (0.9, 0.1))):
        file = tmp_path / "two" / f"0000{index}-0.mp4"
        assert error(file, expected[own]) < error(file, expected[other]) / 2


def test_what_cannot_be_used_is_one_line_before_a_model_is_read(
    wan: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, table = picture(tmp_path / "first.png", 0.5), tmp_path / "prompts.csv"
    table.write_text("prompt,image\na cat,first.png\na dog,\n")
    (tmp_path / "lost.csv").write_text("prompt,image\na cat,lost.png\n")
    monkeypatch.setattr("pipelines.load.load_drawer", None)
    cases = (
        (wan, "text:a cat", (), "1 of 1 prompts have none; give --image FILE, or prompts in a table with a column"),
        (wan, str(table), (), "makes videos of a first frame, and 1 of 2 prompts have none; give --image FILE"),
        (wan, str(tmp_path / "lost.csv"), (), "1 of 1 first frames do not exist, such as"),
        (text, "text:a cat", ("--image", str(image)), "draws from a text alone; remove it"),
    )
    for model, prompts, options, said in cases:
        assert generate(model, tmp_path / "out", prompts, *options) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_text_alone_says_that_it_does_not_see_the_images(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,image\na cat,lost.png\n")
    assert generate(text, tmp_path / "out", str(table)) == 0
    assert "it is not given the first frames of the prompts" in " ".join(capsys.readouterr().err.split())
    assert "first_frame" not in (tmp_path / "out" / "metadata.jsonl").read_text()


def test_a_comparison_refuses_a_model_of_first_frames(
    wan: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--prompts",
        "shapes-validation",
        "--limit",
        "1",
        "--rewards",
        "tiny_runs:Motion",
        "--frames",
        "5",
        "--out",
        str(tmp_path),
    )
    assert main(["compare", text, wan, *options]) == 2
    assert "makes videos of a first frame, which a comparison does not give it" in capsys.readouterr().err


def test_own_pairs_keep_the_images_that_they_started_from(
    wan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [picture(tmp_path / f"{index}.png", level) for index, level in enumerate((0.1, 0.9))]
    table, out, pairs = tmp_path / "prompts.csv", tmp_path / "samples", tmp_path / "pairs.parquet"
    table.write_text("prompt,first_frame\na cat,0.png\na cat,1.png\na cat,0.png\n")
    sample = ["pairs", "sample", wan, "--out", str(out), "--steps", "2", "--guidance", "2", "--batch-size", "1"]
    sample += ["--images-per-prompt", "2", *SIZE, "--prompts"]
    assert main([*sample, str(table)]) == 0
    assert "4 videos (4 new) of 2 prompts (1 repeated ones left out)" in capsys.readouterr().out
    assert main([*sample, str(table)]) == 0 and "(0 new)" in capsys.readouterr().out
    assert main([*sample, "text:a cat"]) == 2 and "give --image FILE" in capsys.readouterr().err
    for source in (out, pairs):  # sampled videos, then the pairs made of them
        labelled = pairs if source is out else tmp_path / "again.parquet"
        assert main(["pairs", "label", str(source), "--reward", "tiny_runs:Motion", "--out", str(labelled)]) == 0
        rows = read_pairs(str(labelled), DataConfig(pairs="p"))
        assert [rows.first_frame(index) for index in range(len(rows))] == [image.read_bytes() for image in images]


def test_without_first_frames_samples_are_as_they_were() -> None:
    assert SampleSettings("m", "f").schema == SCHEMA
    assert prompt_id("a cat") == content_key("a cat")[:16]
