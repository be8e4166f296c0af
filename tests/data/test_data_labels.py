"""Labelled images: every format read, wrong ones named, encoded once and dealt out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_runs import write_pairs

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.data.encoded.label_cache import build_label_cache
from mmalign.data.labels import LabelTable, read_labels
from pipelines import load_generator

ROWS = (("a red circle", "good"), ("a blue circle", "bad"), ("a red circle", "bad"))


def png(seed: int) -> bytes:
    return encode_png(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)))


def write_labels(folder: Path, kind: str, rows: Any = ROWS, **columns: Any) -> Path:
    """Write rows (caption, label) with an image each; `columns` are further lists."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(rows)):
        (folder / f"{index}.png").write_bytes(png(index))
    records: list[dict[str, Any]] = [
        {"image": f"{index}.png", "caption": caption, "label": label} for index, (caption, label) in enumerate(rows)
    ]
    records = [record | {key: values[i] for key, values in columns.items()} for i, record in enumerate(records)]
    path = folder / f"labels.{kind}"
    if kind == "parquet":
        embedded = [record | {"image": {"bytes": png(i), "path": None}} for i, record in enumerate(records)]
        pq.write_table(pa.Table.from_pylist(embedded), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return path


def read(path: Path, **options: Any) -> LabelTable:
    return read_labels(str(path), DataConfig(labels=str(path), **options))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    table = read(write_labels(tmp_path, kind))
    assert [(record.prompt, record.good, record.id) for record in table] == [
        ("a red circle", True, "0"), ("a blue circle", False, "1"), ("a red circle", False, "2")
    ]  # fmt: skip
    assert table.prompts == ["a red circle", "a blue circle"] and table.labels() == [True, False, False]
    contents = [record.image if isinstance(record.image, bytes) else record.image.read_bytes() for record in table]
    assert contents == [png(index) for index in range(3)]
    assert table.counts == "3 images, 1 good and 2 bad" and len(read(tmp_path / f"labels.{kind}", limit=2)) == 2


def test_words_and_numbers_for_labels(tmp_path: Path) -> None:
    for kind, labels in (("jsonl", [1, False, "Good"]), ("csv", ["true", "0", "BAD"]), ("parquet", [1.0, 0.0, 1.0])):
        rows = [("a red circle", label) for label in labels]
        expected = [str(label).lower() in ("1", "1.0", "true", "good") for label in labels]
        assert read(write_labels(tmp_path / kind, kind, rows)).labels() == expected
    with pytest.raises(UserError, match=r"row 0: label 'fine'; allowed: good, bad, true, false, 1, 0"):
        read(write_labels(tmp_path / "wrong", "jsonl", [("a red circle", "fine")]))


def test_pairs_give_a_good_and_a_bad_image_each(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 3)
    table = read(path, limit=5)
    assert table.labels() == [True, False, True, False, True]
    assert [record.id for record in table][:2] == ["1/chosen", "1/rejected"]
    assert [Path(str(record.image)).name for record in table][:3] == ["0-chosen.png", "0-rejected.png", "1-chosen.png"]
    with pytest.raises(UserError, match="neither good nor bad"):
        read(path, ties="keep")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("image,caption\na.png,a red circle\n")
    with pytest.raises(UserError, match="no column 'label'; found 'image', 'caption'; its values are good and bad"):
        read(path)
    path.write_text("caption,label\na red circle,good\n")
    with pytest.raises(UserError, match="no column 'image'"):
        read(path)
    path.write_text("image,caption,label\n")
    with pytest.raises(UserError, match="no column 'caption'|no labelled images"):
        read(path)


def test_rejected_captions_may_stand_for_labels(tmp_path: Path) -> None:
    path = write_labels(tmp_path, "jsonl", caption_rejected=["a blue circle", None, "a red star"])
    table = read(path)
    assert table.prompts == ["a red circle", "a blue circle", "a red star"]
    assert table.rejected_indices() == [1, -1, 2] and table.counts.endswith("2 with a rejected caption")
    assert table.texts(0) == ("a red circle", "a blue circle") and table.texts(1) == ("a blue circle",)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "label"}) for row in rows[:1]))
    assert read(path).labels() == [True]


def test_batches_hold_labels_and_each_content_is_encoded_once(tmp_path: Path) -> None:
    generator = load_generator(build_tiny_sd(tmp_path / "sd", vae="tiny"), device="cpu")
    path = write_labels(tmp_path / "data", "jsonl", caption_rejected=["a blue circle", None, "a red star"])
    done: list[int] = []
    data = DataConfig(labels=str(path), cache=str(tmp_path / "cache"))
    cached = build_label_cache(read(path), generator, data, progress=done.append)
    batch = cached.batch([2, 0], epoch=1, seed=0)
    assert batch.ids == ["2", "0"] and batch.desirable.tolist() == [False, True] and sum(done) == 3
    image = torch.from_numpy(np.array(Image.open(tmp_path / "data" / "2.png"))).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(batch.images[:1], generator.encode_posterior(image[None])[0], rtol=1e-4, atol=1e-5)
    for found, texts in ((batch.cond, ["a red circle"] * 2), (batch.rejected_cond, ["a red star", "a blue circle"])):
        assert found is not None
        torch.testing.assert_close(found.prompt_embeds, generator.encode_prompts(texts).prompt_embeds)
    moved = batch.to("cpu")
    assert moved.rejected_cond is not None and len(moved) == 2
    changed = read(write_labels(tmp_path / "data", "jsonl", [(c, "good") for c, _ in ROWS]))
    again = build_label_cache(changed, generator, data)
    assert again.facts(0) == cached.facts(0) and again.facts(1) != cached.facts(1)
    assert again.batch([0], 0, 0).rejected_cond is None


def test_ids_follow_the_rule_of_pairs(tmp_path: Path) -> None:
    assert read(write_labels(tmp_path, "jsonl", id=["x", None, ""])).ids == ["x", "1", "2"]
    with pytest.raises(UserError, match="id 'x' occurs more than once"):
        read(write_labels(tmp_path, "csv", id=["x", "y", "x"]))
