"""`mmalign pairs sample --from`: samples that start from real images and videos, as DenseDPO's pairs do."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_videos import GEOMETRY, build_tiny_wan, write_clip

from mmalign.cli import main
from mmalign.core.io.clips import ClipRule, read_clip
from mmalign.core.io.decode import decode_video
from mmalign.core.io.video_files import encode_video
from mmalign.data.building import sampling as build
from pipelines import VideoOptions, load_generator

SIZE = tuple(f"--{name}={value}" for name, value in GEOMETRY.items())
CAPTIONS = ("a red circle", "two blue stars", "a star")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three clips with captions: of the model's size, larger, and of three times its frames a second."""
    folder = tmp_path / "clips"
    write_clip(folder / "a.mp4", frames=5)
    write_clip(folder / "b.mp4", frames=5, size=(24, 32), seed=1)
    write_clip(folder / "c.mp4", frames=15, fps=24, seed=2)
    for name, caption in zip("abc", CAPTIONS, strict=True):
        (folder / f"{name}.txt").write_text(caption)
    return folder


def sample(model: str, out: Path, *options: str) -> int:
    drawn = ("--steps", "4", "--guidance", "1", "--images-per-prompt", "2")
    return main(["pairs", "sample", model, "--out", str(out), *drawn, *options])


def rows_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "images.parquet").to_pylist()


def same(some: list[dict[str, Any]], others: list[dict[str, Any]], *keys: str) -> bool:
    """Whether samples agree in `keys` and, but for a kernel's rounding here and there, in their pictures."""
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        first, second = (decode_video(row["image"])[0].float() for row in (one, other))
        if any(one[key] != other[key] for key in keys) or (first - second).abs().mean() > 0.5:
            return False
    return True


def test_samples_of_a_clip_share_a_strength_and_come_out_the_same_again(
    wan: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(wan, tmp_path / "a", "--from", str(clips), *SIZE) == 0
    said = capsys.readouterr()
    assert "6 videos (6 new) of 3 real videos: " in said.out
    assert "3 real clips taken as 5 frames of 16x16: 1 resized, 1 thinned to 8 frames a second" in " ".join(
        said.err.split()
    )
    rows = rows_of(tmp_path / "a")
    assert [row["prompt"] for row in rows] == [caption for caption in CAPTIONS for _ in range(2)]
    assert [Path(row["source"]).name for row in rows] == ["a.mp4", "a.mp4", "b.mp4", "b.mp4", "c.mp4", "c.mp4"]
    strengths = [row["strength"] for row in rows]
    assert strengths[0::2] == strengths[1::2] and len(set(strengths)) == 3
    assert all(0.65 <= strength <= 0.8 for strength in strengths)
    assert len({row["image"] for row in rows}) == 6 and len({row["prompt_id"] for row in rows}) == 3
    assert sample(wan, tmp_path / "b", "--from", str(clips), *SIZE) == 0
    assert same(rows_of(tmp_path / "b"), rows, *(key for key in rows[0] if key != "image"))
    assert sample(wan, tmp_path / "c", "--from", str(clips), *SIZE, "--seed", "1") == 0
    assert not {row["image"] for row in rows_of(tmp_path / "c")} & {row["image"] for row in rows}


def test_strength_0_is_the_clip_through_the_autoencoder_and_1_is_plain_sampling(
    wan: str, clips: Path, tmp_path: Path
) -> None:
    one = ("--from", str(clips), *SIZE, "--limit", "1")
    assert sample(wan, tmp_path / "real", *one, "--strength", "0", "0") == 0
    generator = load_generator(wan, device="cpu", video=VideoOptions(**GEOMETRY))
    levels, _ = read_clip(clips / "a.mp4", ClipRule(5, 8.0))
    with torch.no_grad():
        through = generator.decode(generator.encode(levels[None] / 255))[0]
    assert same(rows_of(tmp_path / "real"), [{"image": encode_video(through, 8.0)}] * 2)
    assert sample(wan, tmp_path / "noise", *one, "--strength", "1", "1") == 0
    assert sample(wan, tmp_path / "plain", "--prompts", CAPTIONS[0], *SIZE) == 0
    assert same(rows_of(tmp_path / "noise"), rows_of(tmp_path / "plain"), "prompt", "seed")


def test_tables_and_tars_of_clips_give_the_same_samples(wan: str, clips: Path, tmp_path: Path) -> None:
    files = [(clips / f"{name}.mp4").read_bytes() for name in "ab"]
    table = pa.table({"video": files, "caption": list(CAPTIONS[:2])})
    pq.write_table(table, tmp_path / "clips.parquet", row_group_size=1)
    with tarfile.open(tmp_path / "clips.tar.gz", "w:gz") as archive:
        for path in sorted(clips.glob("[ab].*")):
            archive.add(path, path.name)
    found = []
    for source in (tmp_path / "clips.parquet", tmp_path / "clips.tar.gz"):
        assert sample(wan, tmp_path / f"from {source.name}", "--from", str(source), *SIZE, "--limit", "2") == 0
        found.append(rows_of(tmp_path / f"from {source.name}"))
    assert [row["prompt"] for row in found[0]] == [CAPTIONS[0]] * 2 + [CAPTIONS[1]] * 2
    assert same(*found, *(key for key in found[0][0] if key not in ("image", "source")))


def test_an_interrupted_sampling_keeps_what_is_drawn(
    wan: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--from", str(clips), *SIZE)
    assert sample(wan, tmp_path / "whole", *options) == 0
    real, made = build.generate_images, []

    def killed(*args: Any, **keywords: Any) -> Any:
        for item in real(*args, **keywords):
            if len(made) == 4:
                raise KeyboardInterrupt
            made.append(item)
            yield item

    monkeypatch.setattr(build, "generate_images", killed)
    assert sample(wan, tmp_path / "parts", *options) != 0
    monkeypatch.setattr(build, "generate_images", real)
    assert not (tmp_path / "parts" / "images.parquet").exists()
    capsys.readouterr()
    moved = clips.rename(tmp_path / "moved")  # a clip is known by its content
    assert sample(wan, tmp_path / "parts", "--from", str(moved), *SIZE) == 0
    assert "6 videos (2 new) of 3 real videos" in capsys.readouterr().out
    assert same(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), "seed")
    assert sample(wan, tmp_path / "parts", "--from", str(moved), *SIZE, "--strength", "0.5", "0.6") == 2
    assert "was made with other settings (strength [0.65, 0.8] -> [0.5, 0.6])" in capsys.readouterr().err


def test_what_cannot_be_used_is_named_and_counted(
    wan: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips / "b.mp4").write_bytes(b"not a video")
    (clips / "c.txt").unlink()
    write_clip(clips / "d.mp4", frames=3)
    rows = [{"video": f"{name}.mp4", "caption": "a star"} for name in "abde"]
    rows[0]["caption"], rows[2]["caption"] = "a red circle", "blue"
    (clips / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"video": "c.mp4", "caption": None}])))
    assert sample(wan, tmp_path / "out", "--from", str(clips / "list.jsonl"), *SIZE) == 0
    said = capsys.readouterr()
    assert "2 videos (2 new) of 1 real videos (4 that cannot be used left out)" in said.out
    told = " ".join(said.err.split())
    for name, why in (("#1", "Invalid data"), ("#2", "holds 3 frames, and"), ("#3", "No such"), ("#4", "no caption")):
        assert f"list.jsonl{name}: " in told and why in told
    (clips / "a.mp4").write_bytes(b"not one either")
    assert sample(wan, tmp_path / "none", "--from", str(clips / "list.jsonl"), *SIZE) == 2
    assert "none of 5 real images or videos can be used" in " ".join(capsys.readouterr().err.split())


def test_images_start_from_images(sd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, side in (("a", 16), ("b", 40)):
        Image.new("RGB", (side, 16), (200, 30, 30)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("red")  # one caption: known apart by their content
    assert sample(sd, tmp_path / "out", "--from", str(folder)) == 0
    said = capsys.readouterr()
    assert "4 images (4 new) of 2 real images" in said.out
    assert "2 real images taken as 16x16: 1 resized" in " ".join(said.err.split())
    rows = rows_of(tmp_path / "out")
    assert len({row["prompt_id"] for row in rows}) == 2 and len({row["image"] for row in rows}) == 4
    reward = ("--reward", "jpeg-compressibility", "--out", str(tmp_path / "pairs.parquet"))
    assert main(["pairs", "label", str(tmp_path / "out"), *reward]) == 0
    assert " of 2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --prompts, or --from for real media with captions"),
        (("--from", "{clips}", "--prompts", "a star"), "with captions, not both"),
        (("--prompts", "a star", "--strength", "0.5", "0.6"), "--strength applies to --from"),
        (("--from", "{clips}", "--strength", "0.8", "0.6"), "two numbers with 0 <= LOW <= HIGH <= 1"),
        (("--from", "{clips}", "--solver", "dpm++"), "starts from noise only; with --from take ddim"),
        (("--from", "{clips}/nothing"), "no such file"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    wan: str, clips: Path, tmp_path: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(wan, tmp_path / "out", *(option.format(clips=clips) for option in options), *SIZE) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_a_pipeline_that_only_draws_is_refused_by_its_index(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sana").mkdir()
    (tmp_path / "sana" / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    assert sample(str(tmp_path / "sana"), tmp_path / "out", "--from", str(clips)) == 2
    assert "which starts from noise; choose a model of the families" in " ".join(capsys.readouterr().err.split())
