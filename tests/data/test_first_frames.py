"""First frames of pairs of videos: which image it is, when a pair has none, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clip_tables import encode, write_table
from tiny_videos import GEOMETRY, build_tiny_wan

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.core.io.video_files import write_video
from mmalign.data.building.generation import generate_images
from mmalign.data.building.sampling import SCHEMA, SampleSettings, prompt_id, sample_images
from mmalign.data.encoded import first_frames
from mmalign.data.encoded.label_cache import CachedLabels, build_label_cache
from mmalign.data.encoded.prompt_cache import build_prompt_cache
from mmalign.data.labels import read_labels
from mmalign.data.pairs import read_pairs
from mmalign.data.prompts import Prompt, check_first_frames, load_prompts
from pipelines import Generator, load_generator
from pipelines.video import VideoOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    path = build_tiny_wan(tmp_path_factory.mktemp("wan"), from_image=True)
    return load_generator(path, device="cpu", video=VideoOptions(**GEOMETRY))  # 5 frames of 16 x 16 at 8 a second


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    path = build_tiny_wan(tmp_path_factory.mktemp("wan"), per_token=True)
    return load_generator(path, device="cpu", video=VideoOptions(**{**GEOMETRY, "height": 32, "width": 32}))


def clip(path: Path, first: float, seed: int = 0, side: int = 16) -> torch.Tensor:
    """Write a video of five frames of which the first has one level everywhere, and return the levels."""
    source = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (5, 3, side, side), generator=source, dtype=torch.uint8)
    levels[0] = int(first)
    write_video(path, levels, 8.0)
    return levels


def encode_labels(model: Generator, source: str, *, good_only: bool = False) -> CachedLabels:
    data = DataConfig(labels=source, cache=str(Path(source).parent / "cache"))
    return build_label_cache(read_labels(source, data, good_only=good_only), model, data)


def expected(model: Any, levels: torch.Tensor) -> torch.Tensor:
    """Return the latents of a video that is grey after its first frame: what the model is given."""
    video = torch.full((1, *model.media_shape), 0.5)
    video[:, 0] = levels.float() / 255
    with torch.no_grad():
        return model.encode(video)


def test_a_pair_is_given_the_first_frame_of_its_videos(model: Generator, tmp_path: Path) -> None:
    clip(tmp_path / "w.mkv", 100), clip(tmp_path / "l.mkv", 108, seed=1), clip(tmp_path / "m.mkv", 30, seed=2)
    rows = [{"chosen": f"{one}.mkv", "rejected": f"{other}.mkv"} for one, other in (("w", "l"), ("m", "m"))]
    cached = encode(model, write_table(tmp_path, rows))
    batch = cached.batch([0, 1], 0, 0)
    for row, level in enumerate((100, 30)):  # that of the chosen side; the other may differ by 8 levels of 255
        levels = torch.full((3, 16, 16), level, dtype=torch.uint8)
        torch.testing.assert_close(batch.cond.first_frame[row : row + 1], expected(model, levels))
    assert batch.cond.first_frame is not None and batch.cond.first_frame.dtype == torch.float32
    assert batch.cond.first_frame.shape == batch.chosen.shape


def test_sides_that_start_differently_are_one_bad_pair(
    model: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip(tmp_path / "w.mkv", 100), clip(tmp_path / "l.mkv", 109, seed=1)
    rows = [{"chosen": "w.mkv", "rejected": other} for other in ("w.mkv", "l.mkv", "w.mkv")]
    source = write_table(tmp_path, rows)
    said = (
        r"pair '1': the first frames of its sides differ by 9\.0 levels of 255 on average \(at most 8\).*first_frame"
    )
    for _ in range(2):  # also where the others are in the cache
        with pytest.raises(UserError, match=f"{said}.*data.on_bad=skip"):
            encode(model, source)
    for _ in range(2):
        cached = encode(model, source, on_bad="skip")
        assert cached.ids == ["0", "2"] and cached.batch([1], 0, 0).cond.first_frame is not None
        assert cached.rates is not None and cached.rates.tolist() == [8.0, 8.0]
        assert "1 of 3 are left out of the training" in " ".join(capsys.readouterr().err.split())


def test_the_loss_of_mp4_files_is_no_difference(model: Generator, tmp_path: Path) -> None:
    for name in ("w.mp4", "l.mkv"):
        source = torch.Generator().manual_seed(len(name))
        levels = torch.randint(0, 256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        levels[1:] = torch.randint(0, 256, (4, 3, 4, 4), generator=source, dtype=torch.uint8)
        write_video(tmp_path / name, levels.repeat_interleave(8, 2).repeat_interleave(8, 3), 8.0)
    encode(model, write_table(tmp_path, [{"chosen": "w.mp4", "rejected": "l.mkv"}]))


@pytest.mark.parametrize("column", ["first_frame", "image"])
def test_a_column_gives_the_first_frame(model: Generator, tmp_path: Path, column: str) -> None:
    clip(tmp_path / "w.mkv", 0), clip(tmp_path / "l.mkv", 250, seed=1)
    picture = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(5))
    (tmp_path / "first.png").write_bytes(encode_png(picture))
    pair = {"chosen": "w.mkv", "rejected": "l.mkv"}
    source = write_table(tmp_path, [{**pair, column: "first.png"}])
    cached = encode(model, source)
    middle = (picture[:, :, 8:24] * 255).round().to(torch.uint8)  # cropped as the videos are
    torch.testing.assert_close(cached.batch([0], 0, 0).cond.first_frame, expected(model, middle))
    (tmp_path / "first.png").write_bytes(encode_png(1 - picture))
    assert encode(model, source).facts(0) != cached.facts(0)
    for bad, said in (("none.png", "first frame: .*none.png' cannot be read"), ("w.mkv", "first frame: unreadable")):
        with pytest.raises(UserError, match=f"pair '0', {said}"):
            encode(model, write_table(tmp_path, [{**pair, column: bad}]))


def test_it_is_encoded_once_for_a_geometry(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "w.mkv", 100), clip(tmp_path / "l.mkv", 100, seed=1)
    source = write_table(tmp_path, [{"chosen": "w.mkv", "rejected": "l.mkv"}] * 2)
    made: list[int] = []
    encode_first = type(model).encode_first_frames
    spy = lambda self, frames: (made.append(len(frames)), encode_first(self, frames))[1]  # noqa: E731
    monkeypatch.setattr(type(model), "encode_first_frames", spy)
    first = encode(model, source, flip=True)
    assert len(made) == 2  # plain and mirrored, of one pair that comes twice
    again = encode(model, source, flip=True)
    assert len(made) == 2 and again.facts(0) == first.facts(0)
    assert torch.equal(again.batch([0], 0, 0).cond.first_frame, first.batch([0], 0, 0).cond.first_frame)
    longer = load_generator(model.name_or_path, device="cpu", video=VideoOptions(16, 16, 1, 8.0))
    encode(longer, source)
    assert len(made) == 3


def test_a_mirrored_pair_has_a_mirrored_first_frame(model: Any, tmp_path: Path) -> None:
    levels = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    levels[..., :8] = 200
    write_video(tmp_path / "w.mkv", levels, 8.0)
    cached = encode(model, write_table(tmp_path, [{"chosen": "w.mkv", "rejected": "w.mkv"}]), flip=True)
    found = {cached._flipped("0", epoch, 0): cached.batch([0], epoch, 0).cond.first_frame for epoch in range(8)}
    torch.testing.assert_close(found[False], expected(model, levels[0]))
    torch.testing.assert_close(found[True], expected(model, levels[0].flip(-1)))


def test_labels_start_from_their_own_frame_or_that_of_their_pair(model: Generator, tmp_path: Path) -> None:
    clip(tmp_path / "w.mkv", 100), clip(tmp_path / "l.mkv", 20, seed=1)
    source = write_table(tmp_path, [{"chosen": "w.mkv", "rejected": "l.mkv"}])
    batch = encode_labels(model, source).batch([0, 1], 0, 0)
    for row, level in enumerate((100, 20)):
        levels = torch.full((3, 16, 16), level, dtype=torch.uint8)
        torch.testing.assert_close(batch.cond.first_frame[row : row + 1], expected(model, levels))
    (tmp_path / "first.png").write_bytes(encode_png(torch.ones(3, 16, 16)))
    row = {"chosen": "w.mkv", "rejected": "l.mkv", "first_frame": "first.png"}
    for good_only in (False, True):
        cached = encode_labels(model, write_table(tmp_path, [row]), good_only=good_only)
        found = cached.batch(list(range(len(cached))), 0, 0).cond.first_frame
        white = expected(model, torch.full((3, 16, 16), 255, dtype=torch.uint8))
        torch.testing.assert_close(found, white.expand(len(cached), -1, -1, -1, -1))


def test_ti2v_is_given_it_where_asked_and_has_it_in_both_videos(ti2v: Any, tmp_path: Path) -> None:
    clip(tmp_path / "w.mkv", 100, side=32), clip(tmp_path / "l.mkv", 104, seed=1, side=32)
    source = write_table(tmp_path, [{"chosen": "w.mkv", "rejected": "l.mkv"}])
    plain = encode(ti2v, source).batch([0], 0, 0)
    assert plain.cond.first_frame is None
    cached = encode(ti2v, source, first_frame=True)
    batch = cached.batch([0], 0, 0)
    with torch.no_grad():
        clean = ti2v.encode(torch.full((1, 1, 3, 32, 32), 100 / 255))
    torch.testing.assert_close(batch.cond.first_frame, clean)
    for number, side in enumerate((batch.chosen, batch.rejected)):
        torch.testing.assert_close(side[:, :, :1], clean)
        drawn = cached._draw(cached.slots[:, number, 0], 0, 0)
        assert torch.equal(side[:, :, 1:], drawn[:, :, 1:]) and not torch.equal(side, drawn)
    assert first_frames.starts_from_image(ti2v, DataConfig(pairs="a")) is False


def test_columns_that_name_the_first_frame(tmp_path: Path) -> None:
    rated = [
        {"video_link": "a.mp4", "prompt": "a cat", "dynamic degree": 4.0, "first_frame": "1.png"},
        {"video_link": "b.mp4", "prompt": "a cat", "dynamic degree": 1.0, "first_frame": "1.png"},
        {"video_link": "a.mp4", "prompt": "a dog", "dynamic degree": 4.0, "first_frame": "1.png"},
        {"video_link": "b.mp4", "prompt": "a dog", "dynamic degree": 1.0, "first_frame": "2.png"},
    ]
    for name in ("a.mp4", "b.mp4", "1.png", "2.png"):
        (tmp_path / name).touch()
    axis = {"axis": "dynamic degree"}
    listed = [{"prompt": "a cat", "image_path": ["a.mp4", "b.mp4"], "rank": [2, 1], "first_frame": "2.png"}]
    named = {"columns": {"prompt": "prompt", "chosen": "image", "rejected": "other"}}
    sides = [{"prompt": "a cat", "image": "a.mp4", "other": "b.mp4"}]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], list[str | None]]] = [
        (rated, axis, ["1.png", None]),  # of the second prompt each video has its own
        (listed, {}, ["2.png"]),
        (sides, named, [None]),  # `image` is a side
        ([{**sides[0], "first_frame": "1.png"}], named, ["1.png"]),
    ]
    for rows, options, expected in cases:
        source = tmp_path / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
        table = read_pairs(str(source), DataConfig(pairs=str(source), **options))
        found = [table.first_frame(index) for index in range(len(table))]
        assert [one.name if isinstance(one, Path) else one for one in found] == expected


def test_a_parquet_holds_its_bytes(tmp_path: Path) -> None:
    picture = encode_png(torch.ones(3, 2, 2))
    both = {"chosen": [b"a", b"c"], "rejected": [b"b", b"d"]}
    pq.write_table(pa.table({"prompt": ["p", "q"], "first_frame": [picture, None], **both}), tmp_path / "p.parquet")
    table = read_pairs(str(tmp_path / "p.parquet"), DataConfig(pairs="p"))
    assert [table.first_frame(index) for index in range(2)] == [picture, None]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "prompt,first_frame\na cat,1.png\na dog,\n"),
        ("p.tsv", "Prompt\tImage\na cat\t1.png\na dog\t\n"),
        ("p.jsonl", '{"prompt": "a cat", "image": "1.png"}\n{"prompt": "a dog"}'),
        ("p.json", '[{"prompt": "a cat", "first_frame": "1.png"}, {"prompt": "a dog", "first_frame": null}]'),
    ],
)
def test_prompts_name_their_first_frames(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    prompts = load_prompts(tmp_path / name)
    assert prompts == [Prompt("a cat", first_frame=tmp_path / "1.png"), Prompt("a dog")]
    with pytest.raises(UserError, match="m makes videos of a first frame, and 1 of 2 prompts have none; fix"):
        check_first_frames(prompts, "m", False, "fix")
    with pytest.raises(UserError, match=r"1 of 1 first frames do not exist, such as .*1\.png; add them"):
        check_first_frames(prompts[:1], "m", True, "fix")
    check_first_frames(prompts[1:], "m", False, "fix")


def test_prompts_of_one_text_and_two_images_are_told_apart(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, level in enumerate((0.0, 1.0)):
        (tmp_path / f"{index}.png").write_bytes(encode_png(torch.full((3, 16, 16), level)))
    (tmp_path / "p.csv").write_text("prompt,image\na cat,0.png\na cat,1.png\n")
    prompts, data = load_prompts(tmp_path / "p.csv"), DataConfig(prompts="p", cache=str(tmp_path / "cache"))
    assert "repeat" not in capsys.readouterr().err
    cached = build_prompt_cache(prompts, model, data)
    batch = cached.batch([1, 0], 0, 0)
    assert batch.ids == ["a cat#1", "a cat#0"] and torch.equal(*batch.cond.prompt_embeds)
    for row, level in enumerate((255, 0)):
        levels = torch.full((3, 16, 16), level, dtype=torch.uint8)
        torch.testing.assert_close(batch.cond.first_frame[row : row + 1], expected(model, levels))
    facts = cached.facts()
    (tmp_path / "1.png").write_bytes(encode_png(torch.full((3, 16, 16), 0.5)))
    changed = build_prompt_cache(prompts, model, data).facts()
    assert changed[:3] == facts[:3] and changed[3] != facts[3]
    assert build_prompt_cache(["a cat"], load_text(tmp_path), data).facts() == ["a cat"]


def test_some_prompts_without_an_image_are_not_given_that_of_others(ti2v: Any, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(encode_png(torch.rand(3, 8, 8)))
    prompts = [Prompt("a cat", first_frame=tmp_path / "1.png"), Prompt("a dog")]
    with pytest.raises(UserError, match="1 of 2 prompts have a first frame; give one to all, or to none"):
        list(generate_images(ti2v, prompts, seeds=[0], steps=1, guidance=1.0, batch_size=2))


def test_samples_of_texts_do_not_look_at_the_images_of_a_table(tmp_path: Path) -> None:
    model = load_text(tmp_path)
    prompts = [Prompt("a cat", first_frame=tmp_path / "lost.png")]
    settings = SampleSettings("m", "f", steps=1, guidance=1.0)
    sample_images(lambda: model, prompts, tmp_path / "out", settings, images_per_prompt=1)
    made = pq.read_table(tmp_path / "out" / "images.parquet")
    assert made.column_names == SCHEMA.names and made["prompt_id"].to_pylist() == [prompt_id("a cat")]


def load_text(folder: Path) -> Generator:
    return load_generator(build_tiny_wan(folder / "text"), device="cpu", video=VideoOptions(**GEOMETRY))
