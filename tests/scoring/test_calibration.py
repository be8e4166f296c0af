"""CaPO's win rates and frontiers by hand, and the pairs that `pairs label --mode calibrated` writes."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmalign.cli import main
from mmalign.core.io.images import encode_png
from mmalign.data.building.sampling import SCHEMA, prompt_id
from mmalign.scoring.calibration import frontier_pairs, win_rates
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.labelling import LabelSettings, label_pairs
from rewards import Reward


class Red(Reward):
    """The mean of the red channel."""

    name = "red"
    channel = 0

    def score(self, media: torch.Tensor, prompts: object, references: object) -> torch.Tensor:
        return media[:, self.channel].mean((1, 2))


class Green(Red):
    channel = 1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_win_rates_by_hand_and_one_half_on_average() -> None:
    scores = [[0.0, 10.0], [1.0, 10.0], [3.0, 40.0]]
    found = win_rates(scores, temperature=2.0)
    assert [row[0] for row in found] == pytest.approx(
        [
            (sigmoid(-0.5) + sigmoid(-1.5)) / 2,
            (sigmoid(0.5) + sigmoid(-1.0)) / 2,
            (sigmoid(1.5) + sigmoid(1.0)) / 2,
        ],
        rel=1e-12,
    )
    assert [row[1] for row in found] == pytest.approx([(0.5 + sigmoid(-15)) / 2] * 2 + [sigmoid(15)], rel=1e-9)
    for column in zip(*found, strict=True):
        assert sum(column) / 3 == pytest.approx(0.5, abs=1e-15) and all(0 < rate < 1 for rate in column)
    assert win_rates([[0.0], [1e6]]) == [[0.0], [1.0]]


def test_frontiers() -> None:
    merits = [(0.9, 0.2), (0.2, 0.9), (0.5, 0.5), (0.1, 0.3), (0.15, 0.1)]
    # 0, 1 and 2 are beaten by none; 3 and 4 beat none
    assert frontier_pairs(merits) == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
    assert frontier_pairs([(0.2,), (0.9,), (0.5,)]) == [(1, 0)]
    assert frontier_pairs([(0.9, 0.1), (0.1, 0.9)]) == []  # each is in both frontiers
    assert frontier_pairs([(0.5,), (0.5,)]) == []


def test_label_writes_win_rates_and_pairs_of_the_frontiers(tmp_path: Path) -> None:
    colours = {"red circle": [(1.0, 0.8), (0.6, 0.9), (0.0, 0.1)], "blue star": [(0.5, 0.5), (0.5, 0.5)]}
    rows = []
    for text, values in colours.items():
        for seed, (red, green) in enumerate(values):
            image = torch.zeros(3, 2, 2)
            image[0], image[1] = red, green
            png = encode_png(image)
            rows.append({"prompt": text, "category": "", "prompt_id": prompt_id(text), "seed": seed, "image": png})
            rows[-1]["model"] = "m"
    images, out = tmp_path / "images.parquet", tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), images)
    rewards = [WeightedReward("red", 2.0, Red()), WeightedReward("green", 1.0, Green())]
    settings = LabelSettings(mode="calibrated", temperature=0.5, pairs_per_prompt=5)
    counts = label_pairs(images, rewards, out, settings)
    assert counts.kept == 2 and counts.left_out["as ties"] == 1
    levels = [[round(v * 255) / 255 for v in one] for one in colours["red circle"]]

    def rate(index: int) -> float:
        others = [j for j in range(3) if j != index]
        red = sum(sigmoid(2 * (levels[index][0] - levels[j][0]) / 0.5) for j in others) / 2
        return (red + sum(sigmoid((levels[index][1] - levels[j][1]) / 0.5) for j in others) / 2) / 2

    for pair in pq.read_table(out).to_pylist():
        best = pair["label_1"] > pair["label_0"]
        chosen, rejected = pair[f"score_{int(best)}"], pair[f"score_{int(not best)}"]
        assert rejected == pytest.approx(rate(2), rel=1e-5)
        assert min(abs(chosen - rate(0)), abs(chosen - rate(1))) < 1e-5


def test_the_command_knows_the_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pairs", "label", str(tmp_path), "--reward", "jpeg", "--out", str(tmp_path / "pairs.parquet")]
    assert main([*arguments, "--mode", "calibrated", "--temperature", "0.5"]) == 2
    assert "holds no pairs; expected" in capsys.readouterr().err
