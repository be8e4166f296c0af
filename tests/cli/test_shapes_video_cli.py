"""`mmalign shapes` with --video: what the commands print and draw."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmalign.cli import main


def test_clips_are_drawn_as_rows_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", "draw", "--video", "--count", "2", "--out", str(tmp_path / "clips.png")]) == 0
    assert "2 clips" in capsys.readouterr().out
    width, height = Image.open(tmp_path / "clips.png").size
    assert width > 9 * 96 and 2 * 96 <= height < 3 * 96


def test_the_words_of_motion_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", "words"]) == 0
    printed = capsys.readouterr().out
    assert "disappears, vanishes, fades away" in printed and "slowly, gently, sluggishly" in printed


@pytest.mark.slow
def test_the_agreement_of_the_oracle_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", "check-oracle", "--video", "--count", "3"]) == 0
    table = capsys.readouterr().out
    assert "oracle on 3 freshly drawn clips" in table and "autoencoder" in table and "100.0 %" in table
