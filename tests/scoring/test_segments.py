"""Labelling segments of videos apart: spans, labels of clips whose motion is known, refusals, and training on them."""

from __future__ import annotations

import io
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_runs import losses, run_config
from tiny_videos import GEOMETRY, build_tiny_wan, write_clip

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.parquet import read_metadata
from mmalign.core.io.video_files import encode_video
from mmalign.data.building.sampling import SCHEMA
from mmalign.data.encoded.cache import build_pair_cache
from mmalign.data.pairs import read_pairs
from mmalign.scoring.labelling import LabelSettings
from mmalign.scoring.pictures import Picture
from mmalign.scoring.segments import Span, check_segments, cut_spans
from mmalign.training.train import train
from pipelines import VideoOptions, load_generator


def moving(speeds: list[int], fps: float = 4.0) -> bytes:
    """Return a lossless clip of a second a speed: a square of 24 pixels that goes right by so many pixels a frame."""
    steps = [speed for speed in speeds for _ in range(int(fps))]
    video = torch.full((len(steps), 3, 128, 128), 0.4)
    for frame, left in enumerate(accumulate([20, *steps[1:]])):
        video[frame, :, 50:74, left : left + 24] = 1.0
    return encode_video(video, fps, lossless=True)


def written(path: Path, groups: dict[str, list[bytes]]) -> Path:
    """Write what `pairs sample` would."""
    rows = [
        {"prompt": text, "category": "", "prompt_id": text, "seed": seed, "image": clip, "model": "m"}
        for text, clips in groups.items()
        for seed, clip in enumerate(clips)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def label(source: Path, out: Path, *options: str, reward: str = "block-motion") -> int:
    return main(["pairs", "label", str(source), "--reward", reward, "--out", str(out), *options])


def segments_of(pairs: Path) -> dict[str, tuple[list[tuple[float, float, float]], float]]:
    """Return by prompt the segments, as our reader gives them (1: the chosen side), and the margin."""
    table = read_pairs(str(pairs), DataConfig(pairs=str(pairs)))
    prompts = [table[index].prompt for index in range(len(table))]
    return {
        prompt: ([tuple(one) for one in table.clip(index).segments], table.margins()[index])
        for index, prompt in enumerate(prompts)
    }


@pytest.mark.parametrize(
    ("frames", "rate", "seconds", "expected"),
    [
        (12, 4.0, 1.0, [(0, 1, 0, 4), (1, 2, 4, 8), (2, 3, 8, 12)]),
        (81, 16.0, 1.0, [(k, k + 1, 16 * k, 16 * k + 16) for k in range(4)] + [(4, 81 / 16, 64, 81)]),
        (14, 4.0, 1.0, [(0, 1, 0, 4), (1, 2, 4, 8), (2, 3, 8, 12), (3, 3.5, 12, 14)]),  # half a segment is one
        (13, 4.0, 1.0, [(0, 1, 0, 4), (1, 2, 4, 8), (2, 3.25, 8, 13)]),
        (10, 3.0, 1.5, [(0, 1.5, 0, 5), (1.5, 10 / 3, 5, 10)]),  # frame 4 is at 1.33 s, frame 5 at 1.67 s
        (4, 4.0, 5.0, [(0, 1, 0, 4)]),
    ],
)
def test_frames_belong_to_the_segment_of_their_time(
    frames: int, rate: float, seconds: float, expected: list[tuple[float, float, int, int]]
) -> None:
    spans = cut_spans(frames, rate, seconds)
    assert [tuple(span) for span in spans] == [pytest.approx(one) for one in expected]
    for frame in range(frames):
        (own,) = [span for span in spans if span.first <= frame < span.last]
        assert own.start - 1e-9 <= frame / rate < own.end
    assert isinstance(spans[0], Span)


def test_each_segment_goes_to_the_side_that_moves_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {
        "mixed": [moving([4, 0, 0]), moving([0, 2, 0])],  # 8 and 4 pixels a frame at 256 pixels a side
        "all": [moving([0, 0, 0]), moving([2, 4, 2])],
        "even": [moving([3, 0, 0]), moving([0, 3, 0])],  # of one mean, and yet a pair
        "same": [moving([2, 0, 2]), moving([2, 0, 2])],
        "broken": [b"no clip", moving([2, 2, 2])],
        "short": [moving([2, 2]), moving([2, 0, 2])],
        "single": [moving([2, 2, 2])],
    }
    source, out = written(tmp_path / "samples.parquet", groups), tmp_path / "pairs.parquet"
    assert label(source, out, "--segments", "1") == 0
    said = capsys.readouterr()
    assert (
        "3 pairs from 3 of 7 prompts; 2 (67 %) have winning and losing segments; segments: 5 chosen, 2 rejected, 2 tie"
        "; prompts left out: 1 as ties, 1 with an image that cannot be read, 1 with videos of different lengths, "
        "1 with a single image"
    ) in said.out
    assert "image of 'broken': unreadable video" in " ".join(said.err.split())
    found = segments_of(out)
    spans = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    labels = {prompt: [one[2] for one in segments] for prompt, (segments, _) in found.items()}
    assert labels == {"mixed": [1, -1, 0], "all": [1, 1, 1], "even": [1, -1, 0]}
    assert all([one[:2] for one in segments] == spans for segments, _ in found.values())
    # Of 3 steps in a segment each is counted, the one that leads into it belongs to none.
    assert found["mixed"][1] == pytest.approx((8 - 4) / 3, rel=0.02)
    assert found["all"][1] == pytest.approx((4 + 8 + 4) / 3, rel=0.02) and found["even"][1] == 0
    assert read_metadata(out)["segments"] == 1.0
    assert label(source, tmp_path / "again.parquet", "--segments", "1") == 0
    assert (tmp_path / "again.parquet").read_bytes() == out.read_bytes()


def test_close_segments_are_ties_and_noise_flips_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster, slower = moving([4, 2]), moving([1, 1])
    source = written(tmp_path / "s.parquet", {f"p{n}": [faster, slower] for n in range(16)})
    given, reward = ("--segments", "1"), "tiny_runs:Motion"
    speed = 2 * 24 * 0.6 / 128**2  # what a pixel a frame adds to the mean difference of frames
    assert label(source, tmp_path / "a.parquet", *given, "--min-margin", str(2 * speed), reward=reward) == 0
    assert "segments: 16 chosen, 0 rejected, 16 tie" in capsys.readouterr().out  # margins of 3 and 1
    assert label(source, tmp_path / "b.parquet", *given, "--label-noise", "0.25", reward=reward) == 0
    flipped = sum(one[2] < 0 for segments, _ in segments_of(tmp_path / "b.parquet").values() for one in segments)
    assert 1 <= flipped <= 15  # 8 of 32, 3 standard deviations
    assert f"segments: {32 - flipped} chosen, {flipped} rejected, 0 tie, {flipped} labels" in capsys.readouterr().out
    assert label(source, tmp_path / "c.parquet", *given, "--min-margin", "1", reward=reward) == 2
    assert "no pair is left to write (0 pairs from 0 of 16 prompts; " in " ".join(capsys.readouterr().err.split())


def test_existing_pairs_of_any_length_are_labelled_by_segments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "short", "chosen": moving([2]), "rejected": moving([0]), "id": "pair-0"},
        {"prompt": "p", "chosen": moving([0, 2]), "rejected": moving([4, 0]), "id": "pair-1"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "given.parquet")
    assert label(tmp_path / "given.parquet", tmp_path / "out.parquet", "--segments", "1") == 0
    table = read_pairs(str(tmp_path / "out.parquet"), DataConfig(pairs="-"))
    assert "the first video lasts 1 s, so it is one segment" in " ".join(capsys.readouterr().err.split())
    assert table.ids == ["pair-0", "pair-1"] and table[1].chosen == rows[1]["rejected"]
    assert [[one.label for one in table.clip(index).segments] for index in range(2)] == [[1], [1, -1]]


@pytest.mark.parametrize(
    ("options", "reward", "said"),
    [
        (("--segments", "0.25"), "block-motion", "a segment has 1 of 8 frames, and reward 'block-motion' needs at"),
        (("--segments", "0.5"), "motion-smoothness", "a segment has 2 of 8 frames, and reward 'motion-smoothness'"),
        (("--segments", "0.1"), "block-motion", "segments of 0.1 s hold less than a frame at 4 a second"),
        (("--segments", "1"), "jpeg-compressibility", "reward 'jpeg-compressibility' judges images"),
        (("--segments", "1", "--mode", "calibrated"), "block-motion", "--mode calibrated compares whole videos"),
        (("--segments", "nan"), "block-motion", "'nan' is not a number of seconds above 0"),
        (("--segments", "1"), "no-such-reward", "no-such-reward"),
    ],
)
def test_what_cannot_be_labelled_is_one_line_before_a_reward_loads(
    tmp_path: Path,
    options: tuple[str, ...],
    reward: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rewards.load_reward", lambda *a, **k: pytest.fail("loaded what cannot score"))
    source = written(tmp_path / "s.parquet", {"p": [moving([2, 0]), moving([0, 2])]})
    try:
        code = label(source, tmp_path / "out.parquet", *options, reward=reward)
    except SystemExit as exit:
        code = int(exit.code or 0)
    assert code == 2 and said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.parquet").exists()


def test_a_segment_without_a_frame_and_frames_without_a_rate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="less than a frame"):
        cut_spans(9, 2.0, 0.3)
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    first = Picture("group", "uid", "prompt", picture.getvalue())
    with pytest.raises(UserError, match="no rate, so nothing tells their seconds"):
        check_segments(first, LabelSettings(), ["block-motion"], 1.0)


def test_a_model_is_trained_on_its_samples_of_real_clips_segment_by_segment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wan = build_tiny_wan(tmp_path / "wan")
    geometry = {**GEOMETRY, "frames": 9}
    for index, caption in enumerate(("a red circle", "two blue stars")):
        write_clip(tmp_path / "clips" / f"{index}.mp4", seed=index)
        (tmp_path / "clips" / f"{index}.txt").write_text(caption)
    size = [f"--{name}={value}" for name, value in geometry.items()]
    drawn = ["--images-per-prompt", "2", "--steps", "5", "--guidance", "1", "--out", str(tmp_path / "samples")]
    assert main(["pairs", "sample", wan, "--from", str(tmp_path / "clips"), *drawn, *size]) == 0
    pairs = tmp_path / "pairs.parquet"
    assert label(tmp_path / "samples", pairs, "--segments", "0.5", reward="tiny_runs:Motion") == 0
    assert "2 pairs from 2 of 2 prompts" in capsys.readouterr().out
    table, data = read_pairs(str(pairs), DataConfig(pairs=str(pairs))), DataConfig(cache=str(tmp_path / "cache"))
    cached = build_pair_cache(table, load_generator(wan, device="cpu", video=VideoOptions(**geometry)), data)
    labels = [[one.label for one in table.clip(index).segments] for index in range(2)]
    assert cached.segments is not None and cached.segments.labels.tolist() == labels
    # Latent frames stand for frames 0, 1 to 4 and 5 to 8, whose middles are at 0, 0.31 and 0.81 s.
    assert cached.segments.shares[0].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    given: Any = {"flow": {"text_length": 32}, "video": geometry, "steps": 2, "data": {}}
    train(run_config(wan, pairs, tmp_path / "run", {"name": "diffusion_dpo", "beta": 20.0}, **given))
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(math.log(2), abs=1e-6) and abs(found[2] - math.log(2)) > 1e-9
    assert "'diffusion_dpo': takes the weights or segments of the pairs" in " ".join(capsys.readouterr().err.split())
