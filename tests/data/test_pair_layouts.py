"""Published preference sets in their own layouts, columns named by the config, folders, tars, globs and hub ids."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmalign.config.sections import ColumnsConfig, DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.core.io.parquet import null_rows
from mmalign.data.labels import read_labels
from mmalign.data.pairs import PairTable, read_pairs
from mmalign.data.readers.hub import HubId, read_hub_id


def png(level: float) -> bytes:
    return encode_png(torch.full((3, 4, 4), level))


A, B, C = png(0.1), png(0.5), png(0.9)


def read(source: Path | str, **options: Any) -> PairTable:
    return read_pairs(str(source), DataConfig(pairs=str(source), **options))


def told(table: PairTable) -> list[tuple[str, object, object]]:
    """Return prompt, chosen and rejected of every pair; files by their names."""
    name = lambda media: media.name if isinstance(media, Path) else media  # noqa: E731
    return [(pair.prompt, name(pair.chosen), name(pair.rejected)) for pair in table]


def write_json(path: Path, records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_hpdv3_prefers_the_first_image(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "u1.jpg").write_bytes(A)
    record = {
        "prompt": "a dog", "path1": "images/u1.jpg", "path2": "images/u2.jpg", "model1": "flux", "model2": "sd2",
        "confidence": 0.99, "choice_dist": [12, 1], "source": "real",
    }  # fmt: skip
    table = read(write_json(tmp_path / "train.json", [record, record | {"prompt": "a cat", "path2": None}]))
    assert told(table) == [("a dog", "u1.jpg", "u2.jpg")]
    assert table[0].chosen == tmp_path / "images" / "u1.jpg" and table[0].margin is None
    assert str(table.counts) == "1 pairs kept of 2 read, 1 without an image"
    write_json(tmp_path / "test.json", [record])
    write_json(tmp_path / "all.json", [record])
    assert len(read(tmp_path)) == 1  # the copy of a repository: its split train


def test_hpdv2_test_split_has_averaged_ranks(tmp_path):
    record = {
        "prompt": "p", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [1, 0, 2],
        "raw_annotations": [{"rank": [1, 0, 2], "user_hash": "u"}],
    }  # fmt: skip
    table = read(write_json(tmp_path / "test.json", [record]))
    assert told(table) == [("p", "1.jpg", "0.jpg"), ("p", "0.jpg", "2.jpg"), ("p", "1.jpg", "2.jpg")]


def imagereward(name: str, rank: int, prompt: str = "p", prompt_id: str = "000864-0061") -> dict[str, Any]:
    return {
        "image_path": f"images/train/train_1/{name}.webp", "prompt_id": prompt_id, "prompt": prompt,
        "classification": "People", "image_amount_in_total": 3, "rank": rank, "overall_rating": 4,
        "image_text_alignment_rating": 3, "fidelity_rating": 4,
    }  # fmt: skip


def test_imagerewarddb_compares_the_images_of_a_prompt(tmp_path):
    folder = tmp_path / "images" / "train" / "train_1"
    folder.mkdir(parents=True)
    (folder / "a.webp").write_bytes(A)
    records = [
        imagereward("a", 2), imagereward("x", 1, "alone", "7-1"), imagereward("b", 1), imagereward("c", 2),
    ]  # fmt: skip
    table = read(write_json(folder / "train_1.json", records))
    assert told(table) == [("p", "b.webp", "a.webp"), ("p", "b.webp", "c.webp")]  # a and c share a rank
    assert table[0].rejected == tmp_path.absolute() / "images" / "train" / "train_1" / "a.webp"
    assert (table.ids[0], table[0].category) == ("000864-0061-0-1", "People")
    assert str(table.counts) == "2 pairs kept of 4 read, 1 ties dropped, 1 without another image of their prompt"
    assert told(read(tmp_path / "images" / "train")) == told(table)
    assert told(read(parquet(tmp_path / "metadata-train.parquet", records))) == told(table)


def test_imagerewarddb_with_images_inside_parquet(tmp_path):
    rows = [
        {"image": {"bytes": data, "path": "x.webp"}, "prompt_id": "1", "prompt": prompt, "rank": rank}
        for data, prompt, rank in ((A, "p", 3), (B, "q", 1), (C, "p", 1), (A, "q", 2))
    ]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    table = read(path)
    assert told(table) == [("p", C, A), ("q", B, A)]
    assert len(set(table.ids)) == 2  # one prompt_id of two prompts


def test_rapidata_counts_weighted_votes(tmp_path):
    votes = "weighted_results_image{}_{}"
    row = {
        "prompt": "p", "image1": {"bytes": A, "path": "1.jpg"}, "image2": {"bytes": B, "path": "2.jpg"},
        "model1": "m", "model2": "n", votes.format(1, "preference"): 0.3, votes.format(2, "preference"): 0.7,
        "detailed_results_preference": "[]", votes.format(1, "alignment"): 1.0, votes.format(2, "alignment"): 0.0,
    }  # fmt: skip
    rows = [row, row | {votes.format(1, "preference"): 0.5, votes.format(2, "preference"): 0.5}]
    table = read(parquet(tmp_path / "r.parquet", rows))
    assert told(table) == [("p", B, A)] and table.counts.ties_dropped == 1
    columns = {"label_0": votes.format(1, "alignment"), "label_1": votes.format(2, "alignment")}
    assert told(read(tmp_path / "r.parquet", columns=columns)) == [("p", A, B)] * 2
    scored = read(tmp_path / "r.parquet", columns={f"score_{i}": votes.format(i + 1, "preference") for i in (0, 1)})
    assert scored[0].margin == pytest.approx(0.4)
    older = {"prompt": "p", "image1": A, "image2": B, "votes_image1": 9, "votes_image2": 17}
    assert told(read(parquet(tmp_path / "v.parquet", [older]))) == [("p", B, A)]
    one = {"prompt": "p", "image1": A, "image2": B, votes.format(1, "style"): 0.9, votes.format(2, "style"): 0.1}
    assert told(read(parquet(tmp_path / "s.parquet", [one]))) == [("p", A, B)]
    with pytest.raises(UserError, match="no column 'weighted_results_image1_preference'.*; set data.columns"):
        read(parquet(tmp_path / "none.parquet", [{"prompt": "p", "image1": A, "image2": B}]))


def test_evalmuse_takes_the_mean_of_its_annotators(tmp_path):
    record = {"prompt_id": "5", "prompt": "p", "type": "real", "element_score": {"a (object)": 1}}
    records = [
        record | {"img_path": "sdxl/1.png", "total_score": [2, 3, 3]},
        record | {"img_path": "pixart/2.png", "total_score": [4, 3, 2]},
    ]
    table = read(write_json(tmp_path / "train_list.json", records))
    assert told(table) == [("p", "2.png", "1.png")] and table[0].category == "real"


def test_visionreward_adds_up_its_dimensions(tmp_path):
    rows = [
        {"image": {"bytes": data, "path": None}, "internal_id": str(number), "prompt": "p", "url": "",
         "annotation": {"symmetry": symmetry, "clarity": 1, "unsafe type": unsafe}}
        for number, (data, symmetry, unsafe) in enumerate(((A, -1, 3), (B, 1, 0)))
    ]  # fmt: skip
    assert told(read(parquet(tmp_path / "v.parquet", rows))) == [("p", B, A)]


def test_richhf_is_compared_by_overall_score(tmp_path):
    rows = [
        {"filename": f"train/{n}.png", "image": data, "caption": "p", "overall_score": score, "artifact_score": 0.5}
        for n, (data, score) in enumerate(((A, 0.75), (B, 0.5)))
    ]
    assert told(read(parquet(tmp_path / "r.parquet", rows))) == [("p", A, B)]
    spaced = [{"image": row["image"], "prompt": "p", "Overall score": row["overall_score"]} for row in rows]
    assert told(read(parquet(tmp_path / "s.parquet", spaced))) == [("p", A, B)]
    (tmp_path / "train.tfrecord").write_bytes(b"")
    with pytest.raises(UserError, match="TFRecords are not read"):
        read(tmp_path / "train.tfrecord")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_prompt_chosen_rejected_in_every_table(tmp_path, suffix):
    rows = [
        {"prompt": "a, b", "chosen": "1.png", "rejected": "2.png"},
        {"prompt": "", "chosen": "1.png", "rejected": "2.png"},
        {"prompt": "c", "chosen": "1.png", "rejected": ""},
    ]
    path = tmp_path / f"pairs{suffix}"
    match suffix:
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        case _:
            parquet(path, rows)
    table = read(path)
    assert told(table) == [("a, b", "1.png", "2.png")] and table[0].chosen == tmp_path / "1.png"
    assert str(table.counts) == "1 pairs kept of 3 read, 1 without a prompt, 1 without an image"
    labels = read_labels(str(path), DataConfig(labels=str(path)))
    assert labels.labels() == [True, False]


def test_json_with_several_documents_is_jsonl(tmp_path):
    record = json.dumps({"prompt": "a", "chosen": "1.png", "rejected": "2.png"})
    (tmp_path / "p.json").write_text(f"{record}\n{record}\n")
    assert len(read(tmp_path / "p.json")) == 2


@pytest.mark.parametrize("struct", [False, True])
def test_null_images_inside_parquet_are_counted(tmp_path, struct):
    cell = (lambda data: {"bytes": data, "path": None}) if struct else (lambda data: data)
    rows = [{"prompt": str(n), "chosen": cell(A), "rejected": cell(None if n == 1 else B)} for n in range(3)]
    rows[2]["rejected"] = None
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    assert null_rows(path, "rejected") == {1, 2} and null_rows(path, "chosen") == set()
    table = read(path)
    assert told(table) == [("0", A, B)] and table.counts.faults == {"without an image": 2}


def test_columns_of_the_config_name_the_roles(tmp_path):
    path = parquet(tmp_path / "p.parquet", [{"text": "p", "good": A, "bad": B, "g": 2.0, "b": 0.5, "kind": "k"}])
    columns = {
        "prompt": "text", "chosen": "good", "rejected": "bad", "score_0": "g", "score_1": "b", "category": "kind",
    }  # fmt: skip
    table = read(path, columns=columns)
    assert told(table) == [("p", A, B)] and (table[0].margin, table[0].category) == (1.5, "k")
    with pytest.raises(UserError, match=r"no column 'chosen', 'rejected'; found 'text', 'good'.*; set data.columns"):
        read(path, caption_column="text")
    with pytest.raises(UserError, match="data.columns: no column 'god'; found 'text', 'good'"):
        read(path, columns=columns | {"chosen": "god"})
    pickapic = {"caption": "p", "jpg_0": A, "jpg_1": B, "label_0": 0.0, "label_1": 1.0}
    swapped = read(parquet(tmp_path / "q.parquet", [pickapic]), columns={"chosen": "jpg_0", "rejected": "jpg_1"})
    assert told(swapped) == [("p", A, B)]  # what the config says goes before what the names say
    rated = [{"prompt": "p", "picture": data, "stars": stars} for data, stars in ((A, 1), (B, 5), (C, None))]
    table = read(parquet(tmp_path / "r.parquet", rated), columns={"image": "picture", "score": "stars"})
    assert told(table) == [("p", B, A)] and table.counts.unlabelled == 2


def test_columns_are_of_pairs(tmp_path):
    path = parquet(tmp_path / "l.parquet", [{"image": A, "caption": "p", "label": "good"}])
    columns = {"chosen": "image", "rejected": "caption"}
    with pytest.raises(UserError, match="a table of labelled images, and data.columns applies to pairs"):
        read_labels(str(path), DataConfig(labels=str(path), columns=columns))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen": "a"}, "chosen and rejected belong together"),
        ({"chosen": "a", "rejected": "b", "image": "c", "rank": "d"}, "chosen and image exclude each other"),
        ({"image": "a"}, "image needs rank or score"),
        ({"image": "a", "rank": "b", "score": "c"}, "rank and score exclude"),
        ({"chosne": "a"}, "Extra inputs"),
    ],
)
def test_columns_that_make_no_pair_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        ColumnsConfig(**columns)


def test_keys_that_are_not_used_leave_the_record_of_a_run_as_it_was():
    plain = DataConfig(pairs="p.parquet").model_dump()
    assert not {"columns", "default_prompt", "streaming"} & plain.keys()
    dumped = DataConfig(pairs="p", columns={"chosen": "a", "rejected": "b"}, default_prompt="x").model_dump()
    assert dumped["columns"] == {"chosen": "a", "rejected": "b"} and dumped["default_prompt"] == "x"
    assert DataConfig(pairs=["a.parquet", "b.parquet"]).pairs == "a.parquet,b.parquet"


def test_globs_and_lists_of_files(tmp_path):
    for name in "ab":
        parquet(tmp_path / f"{name}.parquet", [{"prompt": name, "chosen": A, "rejected": B}])
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "chosen": "1.png", "rejected": "2.png"}))
    assert [pair.prompt for pair in read(tmp_path / "*.parquet")] == ["a", "b"]
    both = read(f"{tmp_path / 'b.parquet'},{tmp_path / 'a.parquet'}")
    assert [pair.prompt for pair in both] == ["b", "a"]
    mixed = read(tmp_path / "a.*")
    assert told(mixed) == [("a", "1.png", "2.png"), ("a", A, B)]
    assert len(set(mixed.ids)) == 2
    with pytest.raises(UserError, match="no such file"):
        read(f"{tmp_path / 'a.parquet'},{tmp_path / 'c.parquet'}")
    with pytest.raises(UserError, match="matches no file"):
        read(tmp_path / "z*.parquet")


def test_image_folders_of_datasets_with_two_file_names(tmp_path):
    (tmp_path / "train").mkdir()
    row = {"chosen_file_name": "1.png", "rejected_file_name": "2.png", "prompt": "p"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "train" / "1.png").write_bytes(A)
    table = read(tmp_path)
    assert told(table) == [("p", "1.png", "2.png")] and table[0].chosen == tmp_path / "train" / "1.png"
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metadata.csv").write_text("file_name,rank,prompt\n1.png,2,p\n2.png,1,p\n")
    assert told(read(tmp_path / "csv")) == [("p", "2.png", "1.png")]


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_of_pairs(tmp_path, mode):
    members = {
        "1.chosen.png": A, "1.rejected.png": B, "1.txt": b"one", "2.l.png": C, "2.w.png": A,
        "2.json": b'{"prompt": "two"}', "grid.png": C,
    }  # fmt: skip
    path = tar(tmp_path / ("p.tar" if mode == "w" else "p.tar.gz"), members, mode)
    assert told(read(path)) == [("one", A, B), ("two", A, C)]
    folders = {"chosen/7.png": A, "chosen/7.caption": b"seven", "rejected/7.png": B}
    assert told(read(tar(tmp_path / "f.tar", folders))) == [("seven", A, B)]
    with pytest.raises(UserError, match="pair '3' has no rejected image"):
        read(tar(tmp_path / "q.tar", {"3.chosen.png": A, "3.txt": b"x"}))
    bare = tar(tmp_path / "r.tar", {"3.chosen.png": A, "3.rejected.png": B})
    with pytest.raises(UserError, match=r"pair '3' has no prompt; .* data.default_prompt"):
        read(bare)
    assert told(read(bare, default_prompt="a photo")) == [("a photo", A, B)]


def test_captions_beside_folders_of_pairs(tmp_path):
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        for name in ("1", "2"):
            (tmp_path / side / f"{name}.png").write_bytes(A)
    (tmp_path / "chosen" / "1.caption").write_text("one\n")
    with pytest.raises(UserError, match=r"pair '2' has no caption file '2.txt' or '2.caption'; .*default_prompt"):
        read(tmp_path)
    assert [pair.prompt for pair in read(tmp_path, default_prompt="any")] == ["one", "any"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", HubId("org/name", None, None, "train")),
        ("org/name:validation", HubId("org/name", None, None, "validation")),
        ("org/name@v1.0:train[:1000]", HubId("org/name", "v1.0", None, "train[:1000]")),
        ("org/name@refs/pr/3:1k/test[10%:20%]", HubId("org/name", "refs/pr/3", "1k", "test[10%:20%]")),
        ("org/name:train+test", HubId("org/name", None, None, "train+test")),
        ("name", None),
        ("a/b/c", None),
    ],
)
def test_hub_ids(text, parts):
    assert read_hub_id(text) == parts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, org/pairs, whose configs are folders; returns how it was asked."""
    import datasets

    for config in ("default", "small"):
        sides = {"chosen": {"bytes": A, "path": None}, "rejected": {"bytes": B, "path": None}}
        rows = [{"prompt": f"{config} {n}", **sides} for n in range(5)]
        parquet(tmp_path / config / "train.parquet", rows)
    asked: list[dict[str, Any]] = []
    real = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        assert path == "org/pairs"
        asked.append({"name": name, **options})
        options.pop("revision")
        files = str(tmp_path / (name or "default") / "train.parquet")
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
        )
        options |= {"features": features, "cache_dir": str(tmp_path / "c")}
        return real("parquet", data_files={"train": files}, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    return asked


def test_hub_ids_with_config_revision_and_slice(hub):
    assert [pair.prompt for pair in read("org/pairs@v2:small/train[1:3]")] == ["small 1", "small 2"]
    assert hub == [{"name": "small", "split": "train[1:3]", "revision": "v2"}]
    assert told(read("org/pairs"))[4] == ("default 4", A, B)


def test_streamed_data_sets_are_read_forwards_and_again(hub):
    table = read("org/pairs:small/train[1:4]", streaming=True, limit=2)
    assert hub[0]["split"] == "train" and hub[0]["streaming"]
    assert told(table) == [("small 1", A, B), ("small 2", A, B)]
    assert told(table) == told(table) and table[1].chosen == A and table[0].rejected == B
    assert len(read("org/pairs", streaming=True)) == 5


def test_streaming_is_of_the_hub(tmp_path):
    parquet(tmp_path / "p.parquet", [{"prompt": "p", "chosen": A, "rejected": B}])
    with pytest.raises(UserError, match="data.streaming applies to data sets of the hub"):
        read(tmp_path / "p.parquet", streaming=True)


NINES = "9" * 6000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"prompt": {}, "chosen": "x", "rejected": "y"}]', "record 1: the prompt is a dict"),
        ("a.json", '[{"prompt": "p", "chosen": 3, "rejected": "y"}]', "expected the path of an image in 'chosen'"),
        ("a.json", "[" * 100_000, "a.json: is not JSON"),
        ("a.json", f'[{{"prompt": "p", "image_path": "a", "rank": {NINES}}}]', "a.json: is not JSON"),
        ("a.jsonl", f'{{"prompt": "p", "image_path": "a", "rank": {NINES}}}', "line 1 is not JSON"),
        ("a.json", f'[{{"prompt": "p", "images": ["a", "b"], "rank": [1, {NINES[:400]}]}}]', "rank is 999"),
        ("a.json", '[{"prompt": "p", "images": ["a", null], "rank": [1, 2]}]', "1 without an image$"),
        ("a.json", '[{"prompt": "p", "images": ["a", "b"], "rank": [NaN, 2]}]', "1 without a label"),
        ("a.json", '[{"prompt": "p", "image": "a", "rank": "first"}]', "rank is 'first'; give a number"),
        ("a.json", "3", "record 1 is a int; expected an object"),
        ("a.csv", "prompt,chosen,chosen,rejected\np,a,b,c\n", "two columns are called 'chosen'; rename one"),
        ("a.csv", "prompt,chosen,rejected\np,a\n", "line 2 has not as many fields"),
        ("a.tar", "junk" * 300, "damaged or cut off tar"),
        ("a.parquet", "PAR1", "not a readable parquet file"),
    ],
)
def test_malformed_sources_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_with_two_columns_of_one_name_or_damaged_pages(tmp_path):
    columns = [pa.array(["p"]), pa.array([A]), pa.array([A]), pa.array([B])]
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "chosen", "rejected"]), tmp_path / "two.parquet")
    with pytest.raises(UserError, match="two columns are called 'chosen'; rename one"):
        read(tmp_path / "two.parquet")
    path = parquet(tmp_path / "d.parquet", [{"prompt": "p" * 50, "chosen": "a.png", "rejected": "b.png"}])
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(UserError, match="d.parquet: damaged .*fetch or write it again"):
        read(path)
    lists = [{"prompt": "p", "image_path": ["1.png", "2.png"], "rank": [2, 1]}]
    assert told(read(parquet(tmp_path / "l.parquet", lists))) == [("p", "2.png", "1.png")]


@pytest.mark.parametrize("source", ["", " ", ","])
def test_an_empty_source_is_not_the_working_directory(source):
    with pytest.raises(UserError, match="empty; give"):
        read(source)
