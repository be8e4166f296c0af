"""Photographic negatives as a preference: what is written, labelled and scored."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch

from benchmarks.negatives import NegativeCorrectness, main
from mmalign.cli import main as mmalign
from mmalign.config.sections import DataConfig
from mmalign.core.io.images import open_image
from mmalign.data.pairs import read_pairs


def test_labelling_prefers_the_negative_of_every_scene(tmp_path: Path) -> None:
    assert main(["--count", "3", "--out", str(tmp_path)]) == 0
    rows = pq.read_table(tmp_path / "images.parquet").to_pylist()
    assert len(rows) == 6 and [row["seed"] for row in rows] == [0, 1] * 3
    out, reward = tmp_path / "pairs.parquet", "benchmarks.negatives:NegativeCorrectness"
    assert mmalign(["pairs", "label", str(tmp_path), "--reward", reward, "--out", str(out)]) == 0
    pairs = read_pairs(str(out), DataConfig())
    assert len(pairs) == 3 and min(pairs.margins()) > 0.1
    inverted = {row["image"] for row in rows if row["seed"] == 1}
    assert {record.chosen for record in pairs} == inverted

    pictures = [open_image(row["image"], "scene") for row in rows[:2]]
    media = torch.stack([torch.tensor(list(one.getdata())).view(64, 64, 3).permute(2, 0, 1) / 255 for one in pictures])
    scores = NegativeCorrectness(device="cpu")(media, prompts=[rows[0]["prompt"]] * 2)
    assert scores[1] == 1.0 and scores[0] < 0.9
