"""pass@k: against the definition with binomials, and against drawing k of n by hand; the command on a tiny model."""

from __future__ import annotations

import json
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS

from benchmarks.pass_at_k import main, pass_at_k, table


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_estimate_is_the_definition(k: int) -> None:
    expected = [1 - comb(8 - c, k) / comb(8, k) for c in range(9)]
    np.testing.assert_allclose(pass_at_k(np.arange(9.0), 8, k), expected, atol=1e-12)


def test_estimate_is_the_mean_over_all_choices() -> None:
    right = [True, False, False, True, False]
    chosen = [any(right[i] for i in some) for some in combinations(range(5), 3)]
    assert pass_at_k(np.array([2.0]), 5, 3)[0] == pytest.approx(np.mean(chosen))


def test_rows_rise_with_k_and_have_intervals_over_prompts() -> None:
    rows = table(np.array([0.0, 4.0, 1.0, 0.0]), 4, [1, 2, 4])
    assert [row["pass"] for row in rows] == pytest.approx([5 / 16, (1 + 0.5) / 4, 0.5])
    assert all(row["low"] < row["pass"] < row["high"] for row in rows)
    assert table(np.array([4.0, 4.0]), 4, [4])[0]["low"] == 1.0


def test_command_draws_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny_sd(tmp_path / "model", vae="tiny")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na ring\n")
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--k", "1,3", "--steps", "1", "--batch", "4"]
    assert main([str(tmp_path / "model"), *given, "--reward", BRIGHTNESS, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "pass@1" in printed and "pass@3" in printed and "right in none of 3" in printed
    assert len(json.loads((tmp_path / "out.json").read_text())["correct"]) == 3
    nowhere = str(tmp_path / "nowhere" / "out.json")
    for wrong in (
        ["--k", "0,1"],
        ["--k", "x"],
        ["--batch", "0"],
        ["--json", nowhere],
        ["--prompts", "no-such-prompts"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / "model"), *wrong])
