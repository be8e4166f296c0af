"""`mmalign generate` with a video model: MP4 files, their contact sheet, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_videos import build_tiny_wan

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.io import video_files
from mmalign.core.io.video_files import write_video
from mmalign.data.encoded.cache import build_pair_cache
from mmalign.data.pairs import read_pairs
from pipelines import VideoOptions, load_generator, sample

PROMPT = "two blue stars"
SIZE = ("--frames", "5", "--height", "32", "--width", "16")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


def generate(model: str, out: Path, *options: str) -> int:
    return main(["generate", model, "--prompts", PROMPT, "--out", str(out), "--steps", "2", *options])


def test_a_video_is_a_file_that_plays_with_a_sheet_of_its_frames(
    wan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = (*SIZE, "--fps", "12", "--seeds", "0,3", "--guidance", "5", "--batch-size", "1")
    assert generate(wan, out, *command) == 0
    assert "2 videos (2 new) of 1 prompts" in capsys.readouterr().out
    with av.open(str(out / "00000-3.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 12.0)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    generator = load_generator(wan, device="cpu", video=VideoOptions(32, 16, 5))
    cond = generator.encode_prompts([PROMPT])
    with torch.no_grad():
        video = generator.decode(sample(generator, cond, steps=2, guidance=5.0, seeds=[3]).latents)[0]
    assert len(frames) == 5 and frames[0].shape == (32, 16, 3)
    written = torch.stack([torch.from_numpy(frame) for frame in frames]).permute(0, 3, 1, 2) / 255
    luma = torch.tensor([0.299, 0.587, 0.114])  # colours are kept at half the resolution
    assert (torch.einsum("fchw,c->fhw", written - video, luma)).abs().mean() < 0.03
    with Image.open(out / "frames.png") as sheet:
        assert sheet.width > 5 * 96 and sheet.height > 2 * 96
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000-0.mp4", "00000-3.mp4"]
    assert generate(wan, out, *command) == 0 and "(0 new)" in capsys.readouterr().out
    assert generate(wan, out, *command[:-2], "--frames", "9") == 2
    assert (
        "video height 32, width 16, frames 5, fps 12 -> height 32, width 16, frames 9, fps 12"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--frames", "6"), "takes videos of 4k + 1 frames, not 6; nearest: 5"),
        (("--image-size", "24"), "not 24 x 24; the nearest size is 32 x 32"),
        (("--fps", "0"), "'0' is not a number of frames a second"),
    ],
)
def test_a_geometry_that_does_not_fit_is_one_line(
    wan: str, tmp_path: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = generate(wan, tmp_path / "out", *options)
    except SystemExit as exit:
        code = int(exit.code or 0)
    assert code == 2 and said in capsys.readouterr().err


def test_video_options_are_not_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(build_tiny_sd(tmp_path / "sd"), tmp_path / "a", "--frames", "5") == 2
    assert "makes images and has no video options" in capsys.readouterr().err


def test_pairs_are_sampled_labelled_by_a_video_reward_and_encoded(
    wan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pairs = tmp_path / "samples", tmp_path / "pairs.parquet"
    drawn = ("--out", str(out), "--steps", "2", "--guidance", "1", "--images-per-prompt", "3", "--batch-size", "1")
    assert main(["pairs", "sample", wan, "--prompts", PROMPT, *drawn, *SIZE, "--fps", "12"]) == 0
    assert "3 videos (3 new) of 1 prompts" in capsys.readouterr().out
    assert main(["pairs", "sample", wan, "--prompts", PROMPT, *drawn, *SIZE, "--fps", "8"]) == 2
    assert "was made with other settings (video " in capsys.readouterr().err
    assert main(["pairs", "label", str(out), "--reward", "tiny_runs:Motion", "--out", str(pairs)]) == 0
    assert "1 pairs from 1 of 1 prompts" in capsys.readouterr().out
    data = DataConfig(pairs=str(pairs), cache=str(tmp_path / "cache"))
    table, options = read_pairs(str(pairs), data), VideoOptions(32, 16, 5, 12.0)
    cached = build_pair_cache(table, load_generator(wan, device="cpu", video=options), data)
    assert cached.batch([0], 0, 0).chosen.shape[2:] == (2, 4, 2) and table.margins()[0] > 0
    assert cached.rates is not None and cached.rates.tolist() == [12.0]


def test_without_h264_an_mp4_still_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(video_files.CODECS, "mp4", ("mp4", "no-such-codec", "yuv420p", {}))
    video = torch.linspace(0, 255, 5).byte().reshape(5, 1, 1, 1).expand(5, 3, 16, 16)
    write_video(tmp_path / "ramp.mp4", video, 8.0)
    with av.open(str(tmp_path / "ramp.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert levels == sorted(levels) and len(levels) == 5 and levels[-1] > 240
