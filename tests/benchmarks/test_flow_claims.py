"""The claims about online RL of flow models: their toy is exact, and the script prints verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import flow_claims
from benchmarks.flow_claims import Finding, Toy, excess_noise, main
from pipelines import cps, flow_sde


def test_the_velocity_is_the_posterior_mean() -> None:
    """One sample of known noise: far from other patterns, the posterior is that of its own Gaussian."""
    toy = Toy(0)
    level, spread = 300.0, flow_claims.SPREAD
    x = 0.7 * toy.patterns[:1] + 0.3 * toy.noise(1)
    variance = 0.7**2 * spread**2 + 0.3**2
    clean = toy.patterns[:1] + 0.7 * spread**2 / variance * (x - 0.7 * toy.patterns[:1])
    torch.testing.assert_close(toy.velocity(x, level), (x - clean) / 0.3, rtol=1e-9, atol=1e-9)


def test_excess_noise_is_that_of_the_formula() -> None:
    assert excess_noise(Toy(0), flow_sde(0.7))[:8] == pytest.approx(
        [1.042, 1.064, 1.028, 1.023, 1.025, 1.036, 1.068, 1.228], abs=6e-4
    )
    assert excess_noise(Toy(0), cps(0.8)) == pytest.approx([1.0] * 9, rel=1e-6)


def test_verdicts() -> None:
    assert [str(Finding("x", 1, low, high, 0.5)).split()[0] for low, high in ((0.6, 2), (0, 0.4), (0, 1))] == [
        "yes", "no", "open"
    ]  # fmt: skip


def test_claims_print_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flat_gradients"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[3].split()[0] == "yes" and "Flash's: 0.99" in lines[3]
    assert (
        main(["--figure", str(tmp_path / "a.svg")]) == 0 and (tmp_path / "a.svg").read_text().count("<polyline") == 3
    )
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "unknown claim" in capsys.readouterr().err
