"""Pairs of videos in the published layouts, each once, with real files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_videos import write_clip

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.data.labels import read_labels
from mmalign.data.pairs import PairTable, read_pairs
from mmalign.data.rarity import rarity_weights
from mmalign.data.readers.source import Segment


def read(source: Path, **options: Any) -> PairTable:
    return read_pairs(str(source), DataConfig(pairs=str(source), **options))


def told(table: PairTable) -> list[tuple[str, str, str]]:
    """Return prompt, and the names of the chosen and of the rejected file, of every pair; all files exist."""
    sides = [(pair.prompt, pair.chosen, pair.rejected) for pair in table]
    assert all(isinstance(one, Path) and one.is_file() for _, *both in sides for one in both)
    return [(prompt, chosen.name, rejected.name) for prompt, chosen, rejected in sides]  # type: ignore[union-attr]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def test_videodpo_names_places_in_a_list_of_videos(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_clip(tmp_path / "clips" / f"{name}.mp4")
    entry = lambda name, score: {  # noqa: E731
        "basic": {"clip_path": f"clips/{name}.mp4", "score": score},
        "misc": {"frame_caption": [f"a {name}", "unused"]},
    }
    write_json(tmp_path / "metadata.json", [entry("a", 0.2), entry("b", 0.9), entry("c", 0.5)])
    pairs = [{"video1": 1, "video2": 0, "frame_caption": ["a dog"], "label": 0}, {"video1": 2, "video2": 0}]
    write_json(tmp_path / "pair.json", pairs)
    table = read(tmp_path)
    assert told(table) == [("a dog", "b.mp4", "a.mp4"), ("a c", "c.mp4", "a.mp4")]
    assert table.margins() == pytest.approx([0.7, 0.3]) and not table.weighed
    write_json(tmp_path / "pair.json", [{"video1": 1, "video2": 3}])
    with pytest.raises(UserError, match=r"pair.json: pair 0 is .*'video2': 3.*entries of metadata.json \(of 3\)"):
        read(tmp_path)


def test_rare_scores_weigh_more(tmp_path: Path) -> None:
    # Ten scores: seven in the fullest bin, two of 0.0, one of 1.0.
    first, second = [0.5, 0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.0, 0.0]
    expected = [1.0, 1.0, 1.0, (7 / math.sqrt(7 * 2)) ** 0.72, (7 / math.sqrt(1 * 2)) ** 0.72]
    assert rarity_weights(first, second, 0.72) == pytest.approx(expected)
    assert rarity_weights(first, second, 0.0) == [1.0] * 5
    rows = [
        {"prompt": "p", "chosen": "a.mp4", "rejected": "b.mp4", "score_0": one, "score_1": other, "id": str(number)}
        for number, (one, other) in enumerate(zip(first, second, strict=True))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in [rows[0] | {"weight": 3.0}, *rows[1:]]))
    table = read(tmp_path / "pairs.jsonl", ties="keep", rarity=0.72)
    assert sorted(table.weights()) == pytest.approx(sorted([3.0, *expected[1:]])) and table.weighed


def test_videoalign_judges_axes(tmp_path: Path) -> None:
    for name in ("1_A", "1_B", "2_A", "2_B"):
        write_clip(tmp_path / "videos" / f"{name}.mp4")
    head = "path_A path_B prompt VQ MQ TA fps_A num_frames_A fps_B num_frames_B".split()
    rows = [
        ["./videos/1_A.mp4", "./videos/1_B.mp4", "a cat", "A", "B", "same", 8.0, 9, 24.0, 9],
        ["./videos/2_A.mp4", "./videos/2_B.mp4", "a dog", "B", "B", "", 8.0, 9, 8.0, 9],
    ]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    source = tmp_path / "data.csv"
    assert told(read(source, axis="VQ")) == [("a cat", "1_A.mp4", "1_B.mp4"), ("a dog", "2_B.mp4", "2_A.mp4")]
    motion = read(source, axis="MQ")
    assert told(motion)[0] == ("a cat", "1_B.mp4", "1_A.mp4") and motion[0].fps == (24.0, 8.0)
    with pytest.raises(UserError, match="1 ties dropped, 1 without a label"):
        read(source, axis="TA")
    assert read(source, axis="TA", ties="keep")[0].tie
    with pytest.raises(UserError, match=r"judges VQ, MQ, TA; choose one by data.axis"):
        read(source)
    with pytest.raises(UserError, match=r"data.axis.*'?Overall"):
        read(source, axis="Overall")
    labels = read_labels(str(source), DataConfig(labels=str(source), axis="MQ"))
    assert [record.fps for record in labels] == [(24.0,), (8.0,), (8.0,), (8.0,)]


def test_videofeedback_compares_ratings_of_one_prompt(tmp_path: Path) -> None:
    def row(name: str, prompt: str, *ratings: int) -> dict[str, Any]:
        write_clip(tmp_path / "videos" / f"{name}.mp4")
        axes = ["visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment"]
        rated = dict(zip([*axes, "factual consistency"], ratings, strict=True))
        link = f"https://example.org/data/{name}.mp4?download=true"
        return {"id": name, "images": [f"{name}_0.jpg"], "text prompt": prompt, "video link": link, **rated}

    source = tmp_path / "data_annotated.json"
    rows = [row("a", "a cat", 3, 3, 3, 3, 3), row("b", "a cat", 1, 2, 4, 2, 1), row("c", "a cat", 3, 3, 2, 3, 3)]
    write_json(source, [*rows, row("d", "a dog", 1, 1, 1, 1, 1)])
    means = read(source)  # 3, 2 and 2.8
    assert told(means) == [("a cat", "a.mp4", "b.mp4")]
    assert means.counts.faults == {"rated less than 1 apart": 2, "without another image of their prompt": 1}
    moving = read(source, axis="dynamic degree")
    assert told(moving) == [("a cat", "b.mp4", "a.mp4"), ("a cat", "a.mp4", "c.mp4"), ("a cat", "b.mp4", "c.mp4")]
    with pytest.raises(UserError, match="data.axis.*motion"):
        read(source, axis="motion")


def test_realdpo_prefers_real_clips_over_each_sample(tmp_path: Path) -> None:
    for name in ("real/x.mp4", "real/y.mp4", "real/z.mp4", "samples/x/0.mp4", "samples/x/1.mp4", "samples/y/0.mp4"):
        write_clip(tmp_path / name)
    (tmp_path / "prompt.txt").write_text("a man walks\na bird\na car\n")
    (tmp_path / "video.txt").write_text("real/x.mp4\nreal/y.mp4\nreal/z.mp4\n")
    table = read(tmp_path)
    assert told(table) == [
        ("a man walks", "x.mp4", "0.mp4"), ("a man walks", "x.mp4", "1.mp4"), ("a bird", "y.mp4", "0.mp4")
    ]  # fmt: skip
    assert table.ids == ["0-0", "0-1", "1"] and table.counts.faults == {"without a rejected video": 1}
    (tmp_path / "rejected.txt").write_text("samples/x/1.mp4\nsamples/y/0.mp4\nsamples/y/0.mp4\n")
    assert told(read(tmp_path))[0] == ("a man walks", "x.mp4", "1.mp4")
    (tmp_path / "prompt.txt").write_text("a man walks\n")
    with pytest.raises(UserError, match="prompt.txt has 1 lines, video.txt has 3 lines, rejected.txt has 3 lines"):
        read(tmp_path)


def test_realdpo_lines_keep_their_places(tmp_path: Path) -> None:
    for name in ("x.mp4", "y.mp4", "z.mp4", "0.mp4", "1.mp4"):
        write_clip(tmp_path / name)
    (tmp_path / "prompt.txt").write_text("\na bird \u2028 on a roof\na car\n\n")
    (tmp_path / "video.txt").write_text("x.mp4\ny.mp4\nz.mp4")
    (tmp_path / "rejected.txt").write_text("0.mp4\n1.mp4\n \n")
    with pytest.raises(UserError, match="rejected.txt has 2 lines"):  # an empty last line is no line
        read(tmp_path)
    (tmp_path / "rejected.txt").write_text("0.mp4\n\n1.mp4\n")
    table = read(tmp_path)
    assert told(table) == [("a car", "z.mp4", "1.mp4")]
    assert table.counts.faults == {"without a rejected video": 1, "without a prompt or a video": 1}


@pytest.mark.parametrize("bad", [-1, math.inf, "heavy"])
def test_weights_are_finite_and_at_least_0(tmp_path: Path, bad: Any) -> None:
    write_clip(tmp_path / "a.mp4")
    pair = {"prompt": "p", "chosen": "a.mp4", "rejected": "a.mp4"}
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps(pair | {"weight": bad}))
    with pytest.raises(UserError, match="record 1: weight is .*0 or more; a column that means something else"):
        read(source)
    source.write_text(json.dumps(pair | {"weight": math.nan, "segments": math.nan}))  # an empty cell of pandas
    table = read(source)
    assert math.isnan(table.weights()[0]) and table.clip(0).segments == () and not table.weighed


def test_jsonl_states_rates_weights_and_segments(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    write_clip(tmp_path / "b.mp4")
    pair = {"prompt": "p", "chosen": "a.mp4", "rejected": "b.mp4", "fps": 8, "frames": 9}
    parts = [{"start": 0, "end": 1, "label": "chosen"}, {"start": 1, "end": 2.5, "label": -1}]
    lines = [pair | {"segments": parts, "weight": 0.5}, pair, pair | {"segments": json.dumps(parts[:1])}]
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    table = read(source)
    assert table.clip(0).segments == (Segment(0, 1, 1), Segment(1, 2.5, -1)) and table[0].fps == (8, 8)
    assert table.weights()[0] == 0.5 and math.isnan(table.weights()[1])
    assert table.clip(2).segments == (Segment(0, 1, 1),) and table.clip(1).segments == ()
    turned = table.clip(0).swapped()
    assert [one.label for one in turned.segments] == [-1, 1]
    for bad in ([{"start": 1, "end": 1, "label": 1}], [{"start": 0, "end": 1, "label": "good"}], {"start": 0}, 3):
        source.write_text(json.dumps(pair | {"segments": bad}))
        with pytest.raises(UserError, match=r"record 1: segments is .*give a list of \{start, end, label\}"):
            read(source)


def test_folders_of_files(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        write_clip(tmp_path / side / "one.mp4")
    (tmp_path / "one.txt").write_text("a cat")
    assert told(read(tmp_path)) == [("a cat", "one.mp4", "one.mp4")]


def test_a_table_holds_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = write_clip(tmp_path / "a.mp4").read_bytes()
    row = {"prompt": "p", "chosen": data, "rejected": {"bytes": data, "path": "a.mp4"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    pair = read(tmp_path / "pairs.parquet")[0]
    assert pair.chosen == pair.rejected == data
    assert torch.tensor(pair.fps).isnan().all()
