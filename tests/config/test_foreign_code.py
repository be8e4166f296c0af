"""A config can name code: `show-config` does not run it, and what it raises elsewhere is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.cli import main

CONFIG = """\
model: assets/shapes-sd
method: {name: 'foreign_code:Method', beta: 5}
data: {pairs: nowhere.parquet}
rewards: [{name: 'foreign_code:Reward'}]
output: out
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign_code.py").write_text("open('ran', 'w')\nraise RuntimeError('boom\\nand more')\n")
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def test_show_config_imports_nothing_that_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "c.yaml", "method.gamma=.5", "--plain"]) == 0
    captured = capsys.readouterr()
    assert "name: foreign_code:Method\n  beta: 5\n  gamma: 0.5\n" in captured.out
    assert captured.err.count("is not resolved here") == 2
    assert not (place / "ran").exists()


def test_what_a_named_module_raises_is_one_line_each(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "c.yaml", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("cannot import foreign_code: boom and more" in line for line in lines)
    assert (place / "ran").exists()


@pytest.mark.parametrize("name", [":", "a:", "..a:b", "..:x", "no_such_module:X"])
def test_names_that_no_module_can_have(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "c.yaml", f"method.name={name}", "rewards=[]", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("output", ["", "  ", "x" * 255])
def test_outputs_that_are_no_folder(place: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.replace("foreign_code:Method', beta: 5", "diffusion_dpo'").replace("rewards: [{name", "# [{name")
    (place / "c.yaml").write_text(text.replace("output: out", f"output: '{output}'"))
    assert main(["show-config", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "output" in error
