"""The examples of the README, run as they stand."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny_sd

from mmalign.cli import main
from rewards import load_reward

README = (Path(__file__).parent.parent / "README.md").read_text()


def example(name: str) -> str:
    code = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.S)
    assert code is not None
    return code.group(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_methods", "my_rewards"):  # another test may have made a module of that name
        sys.modules.pop(name, None)
    yield tmp_path
    for name in ("my_methods", "my_rewards"):
        sys.modules.pop(name, None)


def test_the_method_trains(folder: Path) -> None:
    code = example("method")
    assert len(code.splitlines()) < 60
    (folder / "my_methods.py").write_text(code)
    model = build_tiny_sd(folder / "model")
    for side in ("chosen", "rejected"):
        (folder / "pairs" / side).mkdir(parents=True)
    from PIL import Image

    for number in range(4):
        for side, shade in (("chosen", 200), ("rejected", 60)):
            Image.new("RGB", (16, 16), (shade, 10 * number, 30)).save(folder / "pairs" / side / f"{number}.png")
        (folder / "pairs" / "chosen" / f"{number}.txt").write_text("a red square")
    code_out = main(
        ["train", "shapes/diffusion_dpo", "method={name: 'my_methods:Margin', margin: 0.02}", f"model={model}",
         "data.pairs=pairs", f"data.cache={folder / 'cache'}", "trainer.steps=2", "trainer.batch_size=2",
         "trainer.precision=fp32", "trainer.log_every=1", "evaluate=null", "output=run"]
    )  # fmt: skip
    assert code_out == 0
    assert '"gap"' in (folder / "run" / "metrics.jsonl").read_text()


def test_the_reward_scores(folder: Path) -> None:
    (folder / "my_rewards.py").write_text(example("reward"))
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.5
    assert load_reward("my_rewards:Warmth")(red).item() == pytest.approx(0.5)
