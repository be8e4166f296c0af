"""A metrics.jsonl that is lost, cut off or damaged is said when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.training.tracking import _truncate, read_metrics


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines(2, 4, 6), ""),
        (lines(2, 4, 6, 8), ""),  # beyond the checkpoint: dropped, and computed again
        (lines(2, 4), "ends at step 4, and this run goes on from step 6: the metrics between are lost"),
        ("", "holds no metrics"),
        (None, "is missing"),
        (lines(2, 4, 6) + '{"step": 8, "lo', "1 damaged lines are left out"),
        (lines(2, 4, 6) + "5\n\x00\n" + "[" * 100_000, "3 damaged lines are left out"),
    ],
)
def test_what_is_lost_is_said(tmp_path: Path, content: str | None, said: str, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    _truncate(path, 6, 2)
    error = capsys.readouterr().err
    assert said in error and bool(said) == bool(error)
    assert all(line["step"] <= 6 for line in read_metrics(tmp_path))


def test_a_new_run_says_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(2))
    _truncate(tmp_path / "metrics.jsonl", 0, 2)
    assert read_metrics(tmp_path) == [] and capsys.readouterr().err == ""
