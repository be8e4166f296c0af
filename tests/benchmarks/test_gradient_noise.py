"""The noise of a gradient: unbiased moments, and real methods on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import run_config, write_pairs

from benchmarks.gradient_noise import estimate, main
from mmalign.config.run import dump_config


def test_the_moments_are_those_of_the_draws() -> None:
    # Four vectors with mean (1, 1); deviations (1, 0), (-1, 0), (0, 2), (0, -2): the trace is (1 + 1 + 4 + 4) / 3.
    drawn = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 3.0], [1.0, -1.0]])
    found = estimate(lambda draw: drawn[draw], 4)
    assert found.variance == pytest.approx(10 / 3) and found.signal == pytest.approx(2 - 10 / 12)
    assert found.ratio == pytest.approx((2 - 10 / 12) / (10 / 3))
    with pytest.raises(ValueError, match="1 draws"):
        estimate(lambda draw: drawn[draw], 1)


def test_the_signal_is_estimated_without_bias() -> None:
    source = torch.Generator().manual_seed(0)
    found = [
        estimate(lambda draw: torch.tensor([0.5, 0.0]) + torch.randn(2, generator=source), 5).signal
        for _ in range(4000)
    ]
    # |E g|² = 0.25; the spread of one estimate is about 0.6, so that of the mean is 0.01.
    assert sum(found) / len(found) == pytest.approx(0.25, abs=0.04)


def test_configs_are_measured_by_the_command(tmp_path: Path) -> None:
    model, pairs = build_tiny_sd(tmp_path / "sd", vae="tiny"), write_pairs(tmp_path / "pairs", 6)
    files = []
    for name, options in {"dpo": {"name": "diffusion_dpo"}, "inpo": {"name": "inpo", "inversion_steps": 2}}.items():
        config = run_config(model, pairs, tmp_path / name, options)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(dump_config(config))
    assert main([*map(str, files), "--draws", "3", "--json", str(tmp_path / "noise.json")]) == 0
    found = json.loads((tmp_path / "noise.json").read_text())["configs"]
    assert set(found) == {str(file) for file in files}
    assert all(kind["variance"] > 0 for one in found.values() for kind in one.values())
