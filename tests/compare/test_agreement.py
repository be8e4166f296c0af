"""`mmalign rewards agree`: accuracies that are worked out by hand, ties, categories, and what has no score."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmalign.cli import main
from mmalign.compare.agreement import measure_agreement
from mmalign.compare.stats import RESAMPLES
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.data.pairs import PairRecord
from mmalign.scoring.choice import WeightedReward
from rewards import Reward

REWARDS = """
from rewards import Reward

class Brightness(Reward):
    name = "agree-brightness"
    version = "7"

    def score(self, media, prompts, references):
        return media.mean(dim=(1, 2, 3))

class Darkness(Brightness):
    name = "agree-darkness"
    higher_is_better = False
"""


@pytest.fixture
def module(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "agree_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(tmp_path))
    yield "agree_rewards"
    sys.path.remove(str(tmp_path))
    sys.modules.pop("agree_rewards", None)


def png(level: int) -> bytes:
    return encode_png(torch.full((3, 4, 4), level / 255))


# prompt, category, first image, second image, label of the first (1: preferred, 0.5: tie)
ROWS = [
    ("a", "x", 90, 10, 1.0),  # right
    ("a", "x", 10, 90, 0.0),  # right
    ("a", "x", 90, 10, 0.0),  # wrong
    ("b", "y", 50, 50, 1.0),  # tie of the reward
    ("b", "y", 20, 60, 1.0),  # wrong
    ("c", "y", 70, 10, 1.0),  # right
    ("c", "y", 70, 10, 0.5),  # tie of the labels
    ("c", "y", 70, None, 1.0),  # cannot be read
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        {"caption": prompt, "category": category, "jpg_0": png(one), "jpg_1": png(other) if other else b"broken",
         "label_0": first, "label_1": 1 - first}
        for prompt, category, one, other, first in ROWS
    ]  # fmt: skip
    path = tmp_path / "human.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def bootstrap(groups: list[list[float]], seed: int = 0) -> tuple[float, float]:
    """Return the interval of a ratio over resampled prompts, drawn here prompt by prompt."""
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(4000):
        picked = [groups[index] for index in generator.integers(len(groups), size=len(groups))]
        draws.append(sum(map(sum, picked)) / sum(map(len, picked)))
    return tuple(np.quantile(draws, [0.025, 0.975]))


def test_accuracy_of_a_table_worked_out_by_hand(tmp_path, table, module, capsys):
    command = ["rewards", "agree", str(table), "--reward", f"{module}:Brightness,{module}:Darkness"]
    assert main([*command, "--out", str(tmp_path / "a.json")]) == 3  # one pair has no score
    found = json.loads((tmp_path / "a.json").read_text())
    bright, dark = (found["rewards"][f"{module}:{name}"] for name in ("Brightness", "Darkness"))
    assert (bright["pairs"], bright["prompts"], bright["unscored"], bright["version"]) == (6, 3, 1, "7")
    assert (bright["right"], bright["wrong"], bright["ties"]) == (3, 2, 1)
    assert bright["accuracy"] == pytest.approx(3.5 / 6) and dark["accuracy"] == pytest.approx(2.5 / 6)
    expected = bootstrap([[1, 1, 0], [0.5, 0], [1]])
    assert bright["ci95"] == pytest.approx(expected, abs=0.02)
    x, y = bright["by_category"]["x"], bright["by_category"]["y"]
    assert x["accuracy"] == pytest.approx(2 / 3) and x["ci95"] is None  # a single prompt
    assert y["accuracy"] == pytest.approx(0.5) and (y["pairs"], y["prompts"], y["ties"]) == (3, 2, 1)
    assert found["counts"] == "7 pairs kept of 8 read, 1 ties dropped"
    printed = capsys.readouterr()
    assert "rejected image of pair '7': unreadable image" in printed.err
    first = next(line for line in printed.out.splitlines() if "Brightness" in line)
    assert first.split() == [
        f"{module}:Brightness", "all", "0.583", *f"[{bright['ci95'][0]:.3f}, {bright['ci95'][1]:.3f}]".split(),
        "3", "2", "1", "6", "1",
    ]  # fmt: skip
    assert "ties of the labels left out: 1; ties of a reward count one half" in printed.out

    assert main([*command, "--out", str(tmp_path / "a.csv")]) == 3
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["category"], line["pairs"]) for line in lines] == [("all", "6"), ("x", "3"), ("y", "3")] * 2
    assert float(lines[0]["accuracy"]) == pytest.approx(3.5 / 6) and lines[1]["low"] == ""


def test_any_source_of_pairs_and_what_is_refused(tmp_path, module, capsys):
    for name, level in (("1.png", 90), ("2.png", 10)):
        (tmp_path / name).write_bytes(png(level))
    record = {"text": "p", "path1": "1.png", "path2": "2.png", "confidence": 0.9}
    (tmp_path / "h.json").write_text(json.dumps([record]))
    command = ["rewards", "agree", str(tmp_path / "h.json"), "--columns", "prompt=text", "--reward"]
    assert main([*command, f"{module}:Brightness"]) == 0
    assert "1.000" in capsys.readouterr().out
    for options, message in (
        ([f"{module}:Brightness:2"], "has a weight, and each reward is measured by itself"),
        ([f"{module}:Brightness", "--out", str(tmp_path / "a.txt")], "agreement is written as JSON or CSV"),
        (["clipp"], "did you mean"),
        ([f"{module}:Brightness", "--columns", "prompts=text"], "did you mean 'prompt'"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


class Level(Reward):
    name = "agree-level"

    def score(self, media: torch.Tensor, prompts: object, references: object) -> torch.Tensor:
        return media.mean(dim=(1, 2, 3))


def test_intervals_hold_pairs_of_a_prompt_together():
    """Ten copies of each pair say no more than one: the interval must not shrink with them."""
    pairs = [
        PairRecord(f"prompt {n}", png(90 if n % 3 else 10), png(50), f"{n}-{copy}")
        for n in range(30)
        for copy in range(10)
    ]
    [many] = measure_agreement(pairs, [WeightedReward("level", 1.0, Level())], resamples=RESAMPLES)
    [once] = measure_agreement(pairs[::10], [WeightedReward("level", 1.0, Level())], resamples=RESAMPLES)
    assert many.overall is not None and once.overall is not None
    assert many.overall.accuracy == once.overall.accuracy == pytest.approx(2 / 3)
    assert many.overall.ci95 == pytest.approx(once.overall.ci95)
    low, high = many.overall.ci95
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(2 / 9 / 30), abs=0.04)  # of 30 prompts


def test_ties_of_the_labels_are_refused_here():
    tie = PairRecord("p", png(1), png(2), "i", tie=True)
    with pytest.raises(UserError, match="pair 'i' is a tie"):
        measure_agreement([tie], [WeightedReward("level", 1.0, Level())])
