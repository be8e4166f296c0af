"""Pairs of videos encoded once: frames taken, geometry that must agree, bad clips, segments of latent frames."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_tables import encode, write_table
from tiny_videos import GEOMETRY, build_tiny_wan, write_clip

from mmalign.core.errors import UserError
from mmalign.core.io.clips import ClipRule, ClipSource, read_clip
from mmalign.core.io.video_files import write_video
from mmalign.data.encoded import encoders
from mmalign.data.encoded.segments import cut_segments, latent_times
from mmalign.data.encoded.store import TensorStore
from mmalign.data.encoded.transforms import Decision, VideoTransform, cover
from mmalign.data.readers.source import Segment
from pipelines import Generator, load_generator
from pipelines.video import VideoOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    path = build_tiny_wan(tmp_path_factory.mktemp("wan"))
    return load_generator(path, device="cpu", video=VideoOptions(**GEOMETRY))  # 5 frames of 16 x 16 at 8 a second


def frames_of(path: Path, frames: int, fps: float) -> torch.Tensor:
    """Write a clip whose frame k is the level 10 k everywhere, without loss, and return its levels."""
    levels = (10 * torch.arange(frames)).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).to(torch.uint8)
    write_video(path, levels, fps)
    return levels


def test_frames_are_the_first_ones_at_the_rate_of_the_model(tmp_path: Path) -> None:
    levels = frames_of(tmp_path / "a.mkv", 17, 24.0)
    found, source = read_clip(tmp_path / "a.mkv", ClipRule(5, 8.0))
    assert torch.equal(found, levels[0:13:3]) and source == ClipSource(17, 24.0, 16, 16)
    assert torch.equal(read_clip(tmp_path / "a.mkv", ClipRule(5, 8.0), fps=12.0)[0], levels[[0, 1, 3, 4, 6]])
    assert torch.equal(read_clip(tmp_path / "a.mkv", ClipRule(5, None))[0], levels[:5])
    assert torch.equal(read_clip(tmp_path / "a.mkv", ClipRule(5, 30.0))[0], levels[:5])  # no frame twice
    with pytest.raises(UserError, match="holds 17 frames, 6 at 8 a second, and the model takes 9; give longer clips"):
        read_clip(tmp_path / "a.mkv", ClipRule(9, 8.0))


def test_frames_just_cover_the_size_of_the_model() -> None:
    assert cover((100, 50), (40, 30), Decision()) == (60, 30, 10, 0)
    assert cover((50, 100), (40, 30), Decision(0.0, 1.0)) == (40, 80, 0, 50)
    video = torch.zeros(2, 3, 20, 40, dtype=torch.uint8)
    video[..., 10:30] = 200
    assert VideoTransform(20, 20)(video, Decision()).eq(200).all()
    assert VideoTransform(20, 40)(video, Decision()).equal(video)
    half = VideoTransform(10, 10)(video, Decision())
    assert half.shape == (2, 3, 10, 10) and half[..., 2:8].eq(200).all()


def test_a_pair_is_encoded_as_the_model_encodes_its_frames(model: Generator, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 5, level=128), write_clip(tmp_path / "b.mp4", 5, seed=1)
    cached = encode(model, write_table(tmp_path, [{"chosen": "a.mp4", "rejected": "b.mp4"}]))
    batch = cached.batch([0], 0, 0)
    assert batch.chosen.shape == batch.rejected.shape == (1, *model.latent_shape) and batch.chosen.ndim == 5
    levels, _ = read_clip(tmp_path / "a.mp4", ClipRule(5, 8.0))
    mean, std = model.encode_posterior(levels[None].float() / 255)
    row = cached.latents[torch.tensor([0])]
    torch.testing.assert_close(row["mean"], mean)
    torch.testing.assert_close(row["std"], std)
    assert row["source"].tolist() == [[5, 8, 16, 16]] and cached.rates is not None and cached.rates.tolist() == [8.0]


def test_each_file_is_decoded_once_and_again_only_for_another_geometry(
    model: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(
        encoders, "read_clip", lambda media, *rest: (decoded.append(media.name), read_clip(media, *rest))[1]
    )
    for name in "abc":
        write_clip(tmp_path / f"{name}.mp4", 9, seed=ord(name))
    rows = [{"chosen": "a.mp4", "rejected": "b.mp4"}, {"chosen": "a.mp4", "rejected": "c.mp4"}]
    source = write_table(tmp_path, rows)
    first = encode(model, source)
    assert sorted(decoded) == ["a.mp4", "b.mp4", "c.mp4"] and len(first.latent_keys) == 3
    again = encode(model, source)
    assert len(decoded) == 3 and again.latent_keys == first.latent_keys
    store, key = TensorStore(next((tmp_path / "cache").glob("latents-*"))), first.latent_keys[0]
    assert store.value(key, "source").tolist() == [9, 8, 16, 16]  # without the latents beside it
    other = load_generator(model.name_or_path, device="cpu", video=VideoOptions(16, 16, 9, 8.0))
    longer = encode(other, source)
    assert len(decoded) == 6 and not set(longer.latent_keys) & set(first.latent_keys)


def test_what_resampling_changed_is_said_once(
    model: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, frames, fps in (("a", 15, 24.0), ("b", 30, 24.0), ("c", 5, 4.0), ("d", 5, 4.0), ("e", 5, 8.0)):
        write_clip(tmp_path / f"{name}.mp4", frames, fps, seed=ord(name))
    rows = [("a", "b"), ("c", "d"), ("e", "e")]
    source = write_table(tmp_path, [{"chosen": f"{one}.mp4", "rejected": f"{two}.mp4"} for one, two in rows])
    expected = (
        "5 clips taken as 5 frames of 16x16: 2 thinned to 8 frames a second, 2 of fewer than 8 frames a second, which "
        "the model plays faster, 1 cut to the first 0.625 s"
    )
    for _ in range(2):  # from the cache too
        cached = encode(model, source)
        assert expected in " ".join(capsys.readouterr().err.split())
    assert cached.rates is not None and cached.rates.tolist() == [8, 4, 8]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fps": 4.0}, "its sides would play at 8 and 4 frames a second.*give clips of one rate, or of at least 8"),
        ({"size": (16, 32)}, "its sides are 16x16 and 32x16, and would be cropped to different parts"),
        ({"frames": 4}, r"pair '1', rejected: video .*bad.mp4 cannot be used \(holds 4 frames, and the model takes 5"),
    ],
)
def test_geometry_must_agree_in_a_pair(
    model: Generator, tmp_path: Path, other: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "good.mp4", 5)
    write_clip(tmp_path / "bad.mp4", **{"frames": 5, **other})
    rows = [{"chosen": "good.mp4", "rejected": "good.mp4"}, {"chosen": "good.mp4", "rejected": "bad.mp4"}]
    source = write_table(tmp_path, rows)
    for _ in range(2):  # also where both are in the cache
        with pytest.raises(UserError, match=f"{message}.*data.on_bad=skip"):
            encode(model, source)
    assert encode(model, source, on_bad="skip").ids == ["0"]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 are left out of the training" in said


def test_a_corrupt_clip_is_named_and_left_out_if_asked(model: Generator, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "a.mp4", 5).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    rows = [{"chosen": "a.mp4", "rejected": "cut.mp4"}, {"chosen": "a.mp4", "rejected": "a.mp4"}]
    source = write_table(tmp_path, [*rows, {"chosen": "text.mp4", "rejected": "a.mp4"}])
    with pytest.raises(UserError, match=r"pair '0', rejected: video .*cut.mp4 cannot be used \("):
        encode(model, source)
    assert encode(model, source, on_bad="skip").ids == ["1"]


def test_flips_hold_for_all_frames_of_both_sides(model: Generator, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 5), write_clip(tmp_path / "b.mp4", 5, seed=1)
    source = write_table(tmp_path, [{"chosen": "a.mp4", "rejected": "b.mp4"}])
    cached = encode(model, source, flip=True)
    levels, _ = read_clip(tmp_path / "b.mp4", ClipRule(5, 8.0))
    mean, _ = model.encode_posterior(levels[None].flip(-1).float() / 255)
    assert cached.slots.shape == (1, 2, 2)
    torch.testing.assert_close(cached.latents[cached.slots[0, 1, 1:]]["mean"], mean)


def test_latent_frames_stand_at_the_middle_of_their_frames() -> None:
    # Frames 0 | 1 2 3 4 | 5 6 7 8 at 8 a second.
    assert latent_times(3, 4, 8.0).tolist() == [0.0, 2.5 / 8, 6.5 / 8]
    assert latent_times(3, 1, 2.0).tolist() == [0.0, 0.5, 1.0]


def test_segments_are_shares_of_latent_frames(model: Generator, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 5)
    pair = {"chosen": "a.mp4", "rejected": "a.mp4"}
    part = lambda start, end, label: {"start": start, "end": end, "label": label}  # noqa: E731
    rows = [
        {"segments": [part(0, 0.2, "chosen"), part(0.2, 0.5, "rejected"), part(9, 10, "chosen")]},
        {},
        {"segments": [part(0, 5, -1)]},
    ]
    cached = encode(model, write_table(tmp_path, [pair | row for row in rows]))
    segments = cached.batch([0, 1, 2], 0, 0).segments
    assert segments is not None
    assert segments.labels.tolist() == [[1, -1, 0], [1, 0, 0], [-1, 0, 0]]
    assert segments.shares[:, 0].tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5]] and segments.shares[0, 1].tolist() == [
        0,
        1,
    ]
    changed = replace(cached, segments=segments.select(torch.tensor([1, 1, 2])))
    assert changed.facts(0) != cached.facts(0) and changed.facts(2) == cached.facts(2)
    source = write_table(tmp_path, [pair | {"segments": [part(0, 0.4, 1), part(0.2, 1, 1)]}])
    with pytest.raises(UserError, match="the segments of pair '0' overlap"):
        encode(model, source)


def test_a_rate_that_nobody_knows_is_the_models(model: Generator, tmp_path: Path) -> None:
    from mmalign.core.io.images import tensor_to_image

    for frame in range(6):
        path = tmp_path / "a" / f"{frame}.png"
        path.parent.mkdir(exist_ok=True)
        tensor_to_image(torch.full((3, 16, 16), frame / 10)).save(path)
    cached = encode(model, write_table(tmp_path, [{"chosen": "a", "rejected": "a"}]))
    assert cached.rates is not None and cached.rates.tolist() == [8.0]
    assert math.isnan(cached.latents[torch.tensor([0])]["source"][0, 1])


def test_a_copy_of_the_first_latent_frame_is_of_its_time() -> None:
    """CogVideoX 1.5 puts one in front: 9 frames at 8 a second are latent frames at 0, 0, 0.3125 and 0.8125 s."""
    told = (Segment(0.0, 0.3, 1), Segment(0.3, 1.2, -1))
    table: Any = SimpleNamespace(clip=lambda index: SimpleNamespace(segments=told), ids=["a"], name="pairs")
    generator = SimpleNamespace(latent_shape=(16, 4, 2, 2), media_shape=(9, 3, 16, 16), frame_step=4)
    found = cut_segments(table, generator, torch.tensor([0]), torch.tensor([8.0]))
    assert found is not None and found.labels.tolist() == [[1.0, -1.0]]
    assert found.shares.tolist() == [[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]
