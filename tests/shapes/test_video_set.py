"""`mmalign shapes videos`: what lies on disk is what was drawn and asked, and can be answered anew from the files."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.core.io.decode import Frames, decode
from mmalign.core.io.video_files import write_video
from mmalign.core.io.video_questions import TOPICS
from mmalign.shapes.tracking import follow
from mmalign.shapes.video import Actor, VideoScene, render, unroll
from mmalign.shapes.video_set import read_questions, read_videos, write_video_set

pytest.importorskip("av")


def moving() -> torch.Tensor:
    return render(VideoScene((Actor("ring", "red", 5.5, 9.0, 30.0, "left", 2.0),), "black", 8, 48))


def test_a_set_on_disk_says_what_its_files_show(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    arguments = ["shapes", "videos", "--count", "36", "--split", "test", "--seed", "4", "--frames", "8,9"]
    assert main([*arguments, "--out", str(folder), "--sheet", str(tmp_path / "sheet.png")]) == 0
    videos, questions = read_videos(folder), read_questions(folder)
    assert len(videos) >= 36 and {q.topic for q in questions} == set(TOPICS)
    assert {row.scene.frames for row in videos} == {8, 9}
    by_id = {row.video: row for row in videos}
    seen = {}
    for question in questions:
        row = by_id[question.video]
        assert question.answer_of(unroll(row.scene), row.scene.size) == question.answer
        if question.format == "multi-choice" and question.member == 0:
            media = decode(row.file, "video")
            assert torch.equal(media, render(row.scene))
            seen[question.video] = question.answer_of(follow(media), row.scene.size) == question.answer
    assert len(seen) >= 11 and all(seen.values())
    table = pq.read_table(folder / "questions.parquet").to_pydict()
    assert table["prompt"] == [question.prompt for question in questions]
    assert table["file_name"] == [by_id[question.video].file.relative_to(folder).as_posix() for question in questions]
    assert Image.open(tmp_path / "sheet.png").width > 900


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_video_set(tmp_path / name, 5, seed=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + len(read_videos(tmp_path / "a"))
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_scrambled_videos_show_the_same_frames_in_another_order(tmp_path: Path) -> None:
    write_video_set(tmp_path / "a", 12, seed=3)
    assert main(["shapes", "videos", "--count", "12", "--seed", "3", "--scramble", "--out", str(tmp_path / "b")]) == 0
    assert read_questions(tmp_path / "a") == read_questions(tmp_path / "b")
    moved = 0
    for one, other in zip(read_videos(tmp_path / "a"), read_videos(tmp_path / "b"), strict=True):
        before, after = decode(one.file, "video"), decode(other.file, "video")
        assert sorted(map(bytes, before.numpy())) == sorted(map(bytes, after.numpy())) and one.scene == other.scene
        moved += not torch.equal(before, after)
    assert moved >= 8  # still pictures have one order


def test_matroska_loses_nothing_and_mp4_little(tmp_path: Path) -> None:
    video = moving()
    for suffix, mean_error in (("mkv", 0.0), ("mp4", 2.5)):
        write_video(tmp_path / f"x.{suffix}", video, fps=4.0)
        read = decode(tmp_path / f"x.{suffix}", "video")
        assert read.shape == video.shape
        assert (read.double() - video.double()).abs().mean() <= mean_error


def test_files_are_read_by_count_or_rate(tmp_path: Path) -> None:
    video = moving()
    write_video(tmp_path / "x.mkv", video, fps=4.0)
    assert torch.equal(decode(tmp_path / "x.mkv", "video", Frames(count=3)), video[[0, 4, 7]])
    assert torch.equal(decode(tmp_path / "x.mkv", "video", Frames(fps=2.0)), video[::2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "--count 0: must be 1 or more"),
        (["--split", "tset"], "--split 'tset': train, validation, test; did you mean 'test'?"),
        (["--frames", "8,20"], "--frames '8,20': one or more numbers from 8 to 16"),
        (["--frames", "many"], "--frames 'many': one or more numbers"),
        (["--size", "64"], "--size 64: must be 32 to 48"),
        (["--format", "mp3"], "--format 'mp3': mp4 or mkv; did you mean 'mp4'?"),
        (["--fps", "0"], "--fps 0.0: must be above 0"),
    ],
)
def test_wrong_requests_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shapes", "videos", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an MP4 needs even sides, not 47x48"):
        write_video(tmp_path / "x.mp4", moving()[..., :47])
    with pytest.raises(UserError, match="written as mp4 or mkv"):
        write_video(tmp_path / "x.avi", moving())
    with pytest.raises(UserError, match="`mmalign shapes videos --out"):
        read_videos(tmp_path)
    assert list(tmp_path.iterdir()) == []
