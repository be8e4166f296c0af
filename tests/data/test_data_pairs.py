"""Every format of preference pairs, what is filtered and counted, and that images are read lazily."""

from __future__ import annotations

import json
import math
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.core.io.parquet import ForwardReader, atomic_parquet, read_metadata
from mmalign.data.pairs import PairTable, read_pairs
from mmalign.data.readers.hub import load_hub_rows
from mmalign.data.readers.tabular import TablePairs


def png(level: float) -> bytes:
    return encode_png(torch.full((3, 4, 4), level))


def pickapic(path: Path, rows: list[dict], **options: object) -> Path:
    defaults = {"caption": "a ring", "jpg_0": png(0.0), "jpg_1": png(1.0), "label_0": 1.0, "label_1": 0.0}
    pq.write_table(pa.Table.from_pylist([defaults | row for row in rows]), path, **options)
    return path


def read(source: Path | str, **options: object) -> PairTable:
    return read_pairs(str(source), DataConfig(pairs=str(source), **options))


def test_pickapic_labels_decide_which_side_is_chosen(tmp_path):
    rows = [
        {"caption": "a", "ranking_id": 11},
        {"caption": "b", "label_0": 0.0, "label_1": 1.0, "ranking_id": 12},
        {"caption": "a", "label_0": 0.25, "label_1": 0.75, "ranking_id": 13},
    ]
    table = read(pickapic(tmp_path / "p.parquet", rows))
    assert [(record.prompt, record.id) for record in table] == [("a", "11"), ("b", "12"), ("a", "13")]
    assert [record.chosen == png(0.0) for record in table] == [True, False, False]
    assert [record.rejected == png(1.0) for record in table] == [True, False, False]
    assert table.prompts == ["a", "b"]
    assert [table.prompt_index(index) for index in range(3)] == [0, 1, 0]
    assert table[0].margin is None and all(map(math.isnan, table.margins()))


def test_ties_unlabelled_and_narrow_pairs_are_counted(tmp_path):
    rows = [
        {"label_0": 0.5, "label_1": 0.5, "score_0": 0.0, "score_1": 0.0, "has_label": True},
        {"has_label": False, "score_0": 0.1, "score_1": 0.9},
        {"label_0": None, "score_0": 0.1, "score_1": 0.9, "has_label": True},
        {"score_0": 0.9, "score_1": 0.8, "has_label": True},
        {"label_0": 0.0, "label_1": 1.0, "score_0": 0.9, "score_1": 0.3, "has_label": True},
    ]
    path = pickapic(tmp_path / "p.parquet", rows)
    table = read(path, min_margin=0.5)
    assert len(table) == 1
    assert table[0].margin == pytest.approx(-0.6)  # the label contradicts the score
    assert str(table.counts) == "1 pairs kept of 5 read, 1 ties dropped, 2 without a label, 1 below min_margin"
    kept = read(path, ties="keep")
    assert len(kept) == 3 and kept[0].tie and not kept[1].tie
    assert str(kept.counts) == "3 pairs kept (1 of them ties) of 5 read, 2 without a label"


def test_kept_ties_have_no_preferred_side(tmp_path):
    rows = [{"label_0": 0.5, "label_1": 0.5, "ranking_id": number} for number in range(200)]
    table = read(pickapic(tmp_path / "p.parquet", rows), ties="keep")
    first_side_chosen = sum(record.chosen == png(0.0) for record in table)
    assert 70 < first_side_chosen < 130
    assert first_side_chosen == sum(record.chosen == png(0.0) for record in read(tmp_path / "p.parquet", ties="keep"))


def test_directory_of_parquet_is_read_through_in_order_of_names(tmp_path):
    (tmp_path / "data").mkdir()
    pickapic(tmp_path / "data" / "b.parquet", [{"caption": "third"}])
    pickapic(tmp_path / "data" / "a.parquet", [{"caption": "first"}, {"caption": "second", "jpg_0": png(0.5)}])
    table = read(tmp_path / "data")
    assert [record.prompt for record in table] == ["first", "second", "third"]
    assert table[1].chosen == png(0.5)
    assert len({record.id for record in table}) == 3
    assert [record.prompt for record in read(tmp_path / "data", limit=2)] == ["first", "second"]


def test_of_several_splits_in_a_folder_only_train_is_read(tmp_path, capsys):
    for split in ("train", "validation_unique", "test"):
        pickapic(tmp_path / f"{split}-00000-of-00001-b66ac7.parquet", [{"caption": split}])
    assert [record.prompt for record in read(tmp_path)] == ["train"]
    assert "leaving out test (1), validation_unique (1)" in capsys.readouterr().err


def test_images_as_structs_and_paths_beside_the_file(tmp_path):
    (tmp_path / "left.png").write_bytes(png(0.25))
    row = {"jpg_0": {"bytes": None, "path": "left.png"}, "jpg_1": {"bytes": png(0.75), "path": None}}
    record = read(pickapic(tmp_path / "p.parquet", [row]))[0]
    assert record.chosen == tmp_path / "left.png" and record.rejected == png(0.75)


def test_hub_data_set_and_saved_data_set(tmp_path):
    import datasets

    rows = [{"caption": f"c{number}", "label_0": number % 2, "label_1": 1 - number % 2} for number in range(6)]
    (tmp_path / "org" / "name").mkdir(parents=True)
    pickapic(tmp_path / "org" / "name" / "train.parquet", rows)
    rows = load_hub_rows(str(tmp_path / "org" / "name"))  # a local folder takes datasets' own path
    hub = TablePairs(rows, DataConfig())
    assert [candidate.prompt for candidate in hub.candidates()] == [f"c{number}" for number in range(6)]
    assert hub.images(3) == (png(0.0), png(1.0))

    dataset = datasets.load_dataset("parquet", data_files=str(tmp_path / "org" / "name" / "train.parquet"))["train"]
    for column in ("jpg_0", "jpg_1"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.save_to_disk(tmp_path / "saved")
    table = read(tmp_path / "saved")
    assert [record.chosen for record in table][:2] == [png(1.0), png(0.0)]


def test_hub_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data set 'nobody/nothing:validation' cannot be loaded"):
        read("nobody/nothing:validation")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no such file or directory"):
        read("runs/pairs")
    with pytest.raises(UserError, match="no such file or directory"):
        read("org/pairs.parquet")


def test_hpdv2_lists_compare_all_images(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "train" / name).write_bytes(png(0.5))
    records = [
        {"prompt": "two", "image_path": ["a.png", "b.png"], "human_preference": [0, 1]},
        {"prompt": "three", "image_path": ["x.png", "y.png", "z.png"], "rank": [2, 1, 2]},
        {"prompt": "old", "file_path": ["x.png", "y.png"], "human_preference": [1, 0]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    table = read(tmp_path / "train.json")
    found = [(record.prompt, Path(record.chosen).name, Path(record.rejected).name) for record in table]
    assert found == [
        ("two", "b.png", "a.png"),
        ("three", "y.png", "x.png"),
        ("three", "y.png", "z.png"),
        ("old", "x.png", "y.png"),
    ]
    assert table[0].chosen == tmp_path / "train" / "b.png"  # HPDv2 keeps the images of train.json in train/
    assert table.counts.ties_dropped == 1
    assert len({record.id for record in table}) == 4


def test_jsonl_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    lines = [{"prompt": "a", "chosen": "img/1.png", "rejected": "img/2.png", "id": "p1"}, {"prompt": "b"}]
    path = tmp_path / "set" / "pairs.jsonl"
    path.write_text(json.dumps(lines[0]) + "\n")
    record = read(path)[0]
    assert (record.chosen, record.rejected, record.id) == (
        tmp_path / "set" / "img" / "1.png",
        tmp_path / "set" / "img" / "2.png",
        "p1",
    )
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="record 2: no column 'chosen', 'rejected'; found 'prompt'"):
        read(path)
    path.write_text('{"prompt": "a", \n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read(path)


@pytest.mark.parametrize(("left", "right"), [("chosen", "rejected"), ("w", "l")])
def test_folders_pair_images_by_stem(tmp_path, left, right):
    for folder, level in ((left, 1.0), (right, 0.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.png").write_bytes(png(level))
    (tmp_path / left / "one.txt").write_text("a ring\n")
    record = read(tmp_path)[0]
    assert record.prompt == "a ring"
    # OneTrainer #1403: equal names on both sides must stay two images.
    assert (record.chosen, record.rejected) == (tmp_path / left / "one.png", tmp_path / right / "one.png")
    (tmp_path / right / "one.txt").write_text("a star")
    with pytest.raises(UserError, match="pair 'one' has different captions"):
        read(tmp_path)
    (tmp_path / right / "two.png").write_bytes(png(0.0))
    with pytest.raises(UserError, match="1 images are only in one of .* e.g. 'two'"):
        read(tmp_path)


def test_faulty_sources_say_what_is_wrong(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "jpg_0": [b""], "label_0": [1]}), tmp_path / "columns.parquet")
    with pytest.raises(UserError, match="no column 'caption'; found 'text', 'jpg_0', 'label_0'; data.caption_column"):
        read(tmp_path / "columns.parquet")
    with pytest.raises(UserError, match="no column 'jpg_1', 'label_1'; found"):
        read(tmp_path / "columns.parquet", caption_column="text")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(tmp_path / "broken.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no pairs"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no pairs; expected"):
        read(tmp_path / "nothing")
    (tmp_path / "pairs.zip").write_bytes(b"")
    with pytest.raises(UserError, match="not read from '.zip' files"):
        read(tmp_path / "pairs.zip")
    for preference in (["first", "second"], 1):
        record = {"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": preference}
        (tmp_path / "ranked.json").write_text(json.dumps([record]))
        with pytest.raises(UserError, match="record 1: .*prefer"):
            read(tmp_path / "ranked.json")
    tie = pickapic(tmp_path / "tie.parquet", [{"label_1": 1.0}])
    with pytest.raises(UserError, match="0 pairs kept of 1 read, 1 ties dropped; try data.ties: keep"):
        read(tie)
    with pytest.raises(UserError, match="min_margin: .* has no scores for pair '0'"):
        read(pickapic(tmp_path / "plain.parquet", [{}]), min_margin=0.1)


def test_a_large_file_is_never_held_in_memory(tmp_path):
    image = bytes(100_000)
    rows = [{"jpg_0": image + bytes([number % 256]), "jpg_1": image, "caption": str(number)} for number in range(300)]
    path = pickapic(tmp_path / "large.parquet", rows, compression="none", use_dictionary=False)
    assert path.stat().st_size > 55_000_000  # one row group of 60 MB
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    table = read(path)
    assert pa.total_allocated_bytes() - before < 2_000_000 and tracemalloc.get_traced_memory()[1] < 2_000_000
    peak = 0
    for number, record in enumerate(table):
        assert record.chosen[-1] == number % 256
        peak = max(peak, pa.total_allocated_bytes() - before)
    tracemalloc.stop()
    assert peak < 30_000_000


def test_forward_reader_gives_every_row_in_any_order(tmp_path):
    table = pa.table({"number": list(range(500)), "other": [str(-n) for n in range(500)]})
    pq.write_table(table, tmp_path / "n.parquet", row_group_size=130)
    reader = ForwardReader(tmp_path / "n.parquet", ["number"])
    order = [0, 1, 129, 130, 131, 499, 64, 63, 300, 299, 0]
    assert [reader.row(index) for index in order] == [{"number": index} for index in order]
    with pytest.raises(IndexError):
        reader.row(500)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, schema = tmp_path / "x.parquet", pa.schema([("n", pa.int64())])
    with atomic_parquet(path, schema, {"made": "first"}) as writer:
        writer.add({"n": 1})
    with pytest.raises(RuntimeError), atomic_parquet(path, schema, {"made": "second"}) as writer:
        writer.add({"n": 2})
        raise RuntimeError
    assert read_metadata(path) == {"made": "first"}
    assert pq.read_table(path)["n"].to_pylist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.parquet"]


def test_ids_that_are_null_are_row_numbers_and_repeated_ones_are_refused(tmp_path):
    sides = {"prompt": "a", "chosen": "a.png", "rejected": "b.png"}
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(sides | {"id": value}) + "\n" for value in (None, "", "x")))
    assert read(path).ids == ["1", "2", "x"]
    path.write_text("".join(json.dumps(sides | {"id": value}) + "\n" for value in ("y", "x", "x")))
    with pytest.raises(UserError, match="id 'x' occurs more than once"):
        read(path)
    with pytest.raises(UserError, match="id '7' occurs more than once"):
        read(pickapic(tmp_path / "p.parquet", [{"uid": 7}, {"uid": 7}]))


def test_numbers_and_flags_are_read_in_every_type(tmp_path):
    rows = [{"label_0": "0.25", "label_1": " 1 ", "score_0": "-1.5", "score_1": "2"}]
    table = read(pickapic(tmp_path / "p.parquet", rows))
    assert table[0].chosen == png(1.0) and table[0].margin == 3.5
    decimals = pickapic(tmp_path / "p.parquet", [{"label_0": Decimal("0.1"), "label_1": Decimal("0.9")}])
    assert read(decimals)[0].chosen == png(1.0)
    for no, yes in ((0, 1), ("0", "1"), ("False", "true"), (0.0, 1.0)):
        table = read(pickapic(tmp_path / "p.parquet", [{"has_label": no}, {"has_label": yes}, {"has_label": None}]))
        assert table.ids == ["1", "2"] and table.counts.unlabelled == 1
    with pytest.raises(UserError, match="row 1: label_0 is 'left'; give a number, not a str"):
        read(pickapic(tmp_path / "p.parquet", [{"label_0": "1"}, {"label_0": "left"}]))
    with pytest.raises(UserError, match="row 0: has_label is 2; give true, false, 1 or 0"):
        read(pickapic(tmp_path / "p.parquet", [{"has_label": 2}]))
