"""Captions that do not fit: the rules of Shapes never make a true one, and `pairs perturb` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chat_server import serve
from tiny_runs import write_pairs

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.data.building.captions import perturb_captions
from mmalign.data.labels import read_labels
from mmalign.shapes.language import parse
from mmalign.shapes.oracle import correctness
from mmalign.shapes.perturb import contradicts, false_captions
from mmalign.shapes.world import Object, Scene, render


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a red circle", "a blue circle", True),
        ("a circle", "a blue circle", False),  # the colour was left open
        ("a red circle and a blue circle", "a blue circle and a red circle", False),
        ("two stars", "three stars", True),
        ("two stars", "a star and a star", False),
        ("a ring left of a star", "a ring above a star", False),  # up and to the left is both
        ("a ring left of a star", "a ring to the right of a star", True),
        ("a ring left of a star", "a star to the right of a ring", False),
        ("a ring left of a star", "a star to the left of a ring", True),
        ("a ring left of a star", "a star next to a ring", False),
        ("a ring next to a star", "a star next to a ring", False),
        ("a red ring left of a blue ring", "a blue ring left of a red ring", True),
        ("a ring left of a ring", "a ring right of a ring", False),  # which is which was not said
        ("a star on a black background", "a star on a white background", True),
        ("a star on a black background", "a star", False),
        ("a small star", "a large star", True),
    ],
)
def test_contradictions(first: str, second: str, expected: bool) -> None:
    assert contradicts(parse(first), parse(second)) is contradicts(parse(second), parse(first)) is expected


def test_each_kind_of_edit_is_made_and_none_is_true() -> None:
    found = false_captions("a red circle to the left of a blue square")
    assert set(found) == {"counts", "objects", "attributes", "relations", "swap"}
    assert sorted(found["relations"]) == [
        "a blue square to the left of a red circle",
        "a red circle to the right of a blue square",
    ]
    assert found["swap"] == ["a blue circle to the left of a red square"]
    assert "a red circle to the left of a yellow square" in found["attributes"]
    assert "swap" not in false_captions("a red circle and a blue circle")
    things = (Object("circle", "red", "large", 18, 32, 12.5), Object("square", "blue", "large", 46, 32, 12.5))
    picture = render(Scene(things, "white"))
    assert correctness("a red circle to the left of a blue square", picture) == 1
    assert all(correctness(caption, picture) < 1 for captions in found.values() for caption in captions)


def test_perturb_keeps_the_good_images_and_draws_by_seed_and_id(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, 6)
    table = read_labels(str(pairs), DataConfig(labels=str(pairs)))
    counts = perturb_captions(table, tmp_path / "a.parquet", seed=1)
    assert (counts.kept, counts.bad, counts.without) == (6, 6, 0) and sum(counts.edits.values()) == 6
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"{number}/chosen" for number in range(1, 7)]
    assert rows[3]["image"] == (tmp_path / "3-chosen.png").read_bytes()
    for row in rows:
        assert row["caption_rejected"] in false_captions(row["caption"])[row["edit"]] and row["label"] == "good"
    perturb_captions(table, tmp_path / "b.parquet", seed=1)
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == rows
    perturb_captions(table, tmp_path / "c.parquet", seed=2)
    assert pq.read_table(tmp_path / "c.parquet").to_pylist() != rows
    again = read_labels(str(tmp_path / "a.parquet"), DataConfig(labels="x"))
    assert again.labels() == [True] * 6 and min(again.rejected_indices()) >= 0


def test_perturb_by_a_language_model_and_its_mistaken_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs, out = write_pairs(tmp_path, 2), tmp_path / "out.parquet"
    arguments = ["pairs", "perturb", str(pairs), "--out", str(out)]
    with serve(lambda text, images: "1. a green square\n2. a green star") as server:
        assert main([*arguments, "--endpoint", server.url, "--llm", "tiny"]) == 0
    assert {row["caption_rejected"] for row in pq.read_table(out).to_pylist()} <= {"a green square", "a green star"}
    for wrong, said in (
        (["--llm", "tiny"], "--llm applies to --endpoint"),
        (["--endpoint", "http://localhost:1"], "give --llm"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_captions_of_another_world_are_refused_and_the_way_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((write_pairs(tmp_path, 1).parent / "0-chosen.png").read_bytes())
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"image": "a.png", "caption": "two black cats on a sofa", "label": "good"}))
    table = read_labels(str(path), DataConfig(labels=str(path)))
    with pytest.raises(UserError, match="cannot read .*--contrast rules, or --endpoint"):
        perturb_captions(table, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    perturb_captions(table, tmp_path / "out.parquet", "rules")
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["caption_rejected"] != row["caption"] and row["edit"] == "contrast"
