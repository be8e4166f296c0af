"""The scripts of examples/, run as they stand; none was there before that is not run."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from rewards import registry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry._LOOKUP, "_registered", {})
    return tmp_path


def play(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert all(f'play("{path.name}")' in here for path in EXAMPLES.glob("*.py"))


def test_train_on_pairs(folder: Path) -> None:
    left = play("train_on_pairs.py")
    curve = left["result"].curve("loss")
    assert curve[0] == (1, pytest.approx(0.693147, abs=1e-5))  # at first the policy is the reference: log 2
    assert curve[-1][0] == 10 and curve[-1][1] < curve[0][1]
    assert (folder / "runs/examples/dpo/pytorch_lora_weights.safetensors").is_file()
    assert (folder / "runs/examples/dpo.png").is_file()


def test_write_a_reward(folder: Path) -> None:
    left = play("write_a_reward.py")
    redness = left["scores"]["redness"]
    assert sum(redness[:4]) / 4 > 0 > max(redness[4:])  # red circles are redder than blue ones
    totals, right = left["weighted"]["total"], left["scores"]["shapes-correctness"]
    assert totals == pytest.approx([one + 0.5 * other for one, other in zip(redness, right, strict=True)])


def test_compare_models(folder: Path) -> None:
    left = play("compare_models.py")
    results = left["outcome"].results
    assert list(results["systems"]) == ["base", "sft"] and results["prompts"] == 4 and results["seeds"] == [0, 1]
    assert len(left["outcome"].table) == 4 and left["outcome"].report.is_file()
