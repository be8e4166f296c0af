"""The scores on disk: formulas, reserved labels, damaged files, unfinished parts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.cli import main

PROMPTS = ["=1+1", "-a minus", "'@quoted", "plain"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    rng = np.random.default_rng(0)
    for number, prompt in enumerate(PROMPTS):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(f"images/={number}.png")
        Path(f"images/={number}.txt").write_text(prompt)


def score(*arguments: str, out: str = "s.csv", rewards: str = "jpeg-compressibility") -> int:
    return main(["score", "images", "--rewards", rewards, "--out", out, *arguments])


def test_formulas_are_escaped_and_read_back(folder, capsys):
    assert score() == 0
    rows = list(csv.DictReader(open("s.csv", newline="")))
    assert [row["prompt"] for row in rows] == ["'=1+1", "'-a minus", "''@quoted", "plain"]
    assert all(row["jpeg-compressibility"].startswith("-") for row in rows)  # a number, not text
    before = Path("s.csv").read_bytes()
    capsys.readouterr()
    assert score() == 0 and "(0 new)" in capsys.readouterr().out
    assert Path("s.csv").read_bytes() == before


@pytest.mark.parametrize("label", ["error", "id", "path", "prompt", "stamp", "total", "a\nb", "x" * 256])
def test_reserved_labels_are_refused(folder, label, capsys):
    Path("r.yaml").write_text(json.dumps({"rewards": [{"name": "jpeg-compressibility", "label": label}]}))
    assert score(rewards="r.yaml") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "choose another label" in error or "is no label" in error
    assert not Path("s.csv").exists()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\xff\xfe\0" * 50,
        lambda raw: raw.replace(b"stamp", b"stimp"),
        lambda raw: b"[" * 100_000,
        lambda raw: raw.replace(b"=0.png", b'="0"png'),
    ],
)
def test_a_damaged_file_is_one_line(folder, suffix, damage, capsys):
    out = f"s.{suffix}"
    assert score(out=out) == 0
    Path(out).write_bytes(damage(Path(out).read_bytes()))
    capsys.readouterr()
    code, error = score(out=out), capsys.readouterr().err
    assert code == 0 or (code == 2 and error.count("\n") == 1 and out in error)


def test_a_failed_run_does_not_block_another(folder, capsys):
    Path("images/=9.png").write_bytes(b"no picture")
    assert score("--batch-size", "1") == 2
    assert "4 are scored and kept" in capsys.readouterr().err
    Path("images/=9.png").unlink()
    assert score(rewards="jpeg-incompressibility") == 0
    said = capsys.readouterr().err
    assert "parts of an unfinished run are left out" in said and "other settings" in said
    Path("s.csv").unlink()
    assert score() == 0  # what the failed run kept is still used
    assert "4 images (0 new)" in capsys.readouterr().out
    assert not Path("s.csv.parts").exists()


def test_sizes_are_refused_before_a_reward_is_loaded(folder, capsys, monkeypatch):
    import rewards

    monkeypatch.setattr(rewards, "load_reward", lambda *_, **__: pytest.fail("loaded"))
    Image.new("RGB", (80, 64)).save("images/wide.png")
    assert score(rewards="shapes-quality") == 2
    error = capsys.readouterr().err
    assert "1 of 5 images do not have 64 x 64 pixels" in error and "wide.png, 80 x 64" in error


@pytest.mark.parametrize("out", ["", "  ", "x" * 250 + ".csv", "a\0.csv"])
def test_paths_that_are_none(folder, out, capsys):
    assert score(out=out) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_options_and_devices_that_hold_no_numbers(folder, capsys):
    for options in (
        ["--rewards", "combine"],
        ["--rewards", "vlm-judge", "--prompt", "x"],
        ["--rewards", "jpeg-compressibility", "--device", "meta"],
    ):
        assert main(["score", "images", "--out", "o.csv", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
