"""Curves of a comparison's trainings as SVG files: means and spans over seeds, one scale for all systems."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.curves import main, read_curves


def write_run(folder: Path, evaluations: list[tuple[int, float]]) -> str:
    folder.mkdir(parents=True)
    lines = [{"step": n, "images_seen": cost, "evaluation/clip": value} for n, (cost, value) in enumerate(evaluations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    seeds = {
        "0": {"model": write_run(tmp_path / "a", [(0, 0.5), (100, 0.7)])},
        "1": {"model": write_run(tmp_path / "a-seed1", [(0, 0.4), (100, 0.9), (200, 1.0)])},
    }
    systems = {
        "base": {"model": str(tmp_path / "nothing")},
        "a<b": {"model": seeds["0"]["model"], "training_seeds": seeds},
        "c": {"model": write_run(tmp_path / "c", [(0, 0.5), (300, 0.6)])},
    }
    (tmp_path / "results.json").write_text(json.dumps({"systems": systems}))
    return tmp_path


def test_curves_are_means_and_spans_over_the_seeds_above_their_starts(comparison: Path) -> None:
    curves = read_curves(comparison)
    assert set(curves) == {"a<b", "c"}
    points = [value for point in curves["a<b"]["clip"] for value in point]
    assert points == pytest.approx([0, 0, 0, 0, 100, 0.35, 0.2, 0.5])
    (start, end) = curves["c"]["clip"]
    assert start == (0, 0, 0, 0) and end == pytest.approx((300, 0.1, 0.1, 0.1))


def test_every_trained_system_gets_a_picture_on_one_scale(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(comparison), "--out", str(comparison / "curves")]) == 0
    assert "2 systems" in capsys.readouterr().out
    pictures = {path.stem: ElementTree.parse(path).getroot() for path in (comparison / "curves").iterdir()}
    assert set(pictures) == {"a<b", "c"}
    title = next(pictures["a<b"].iter("{http://www.w3.org/2000/svg}title"))
    assert title.text == "a<b"
    ticks = [[text.text for text in one.iter("{http://www.w3.org/2000/svg}text")] for one in pictures.values()]
    assert ticks[0] == ticks[1] and "0.4" in ticks[0]
    # Both end at their own cost: the means' lines stop a third and all of the way along the axis.
    ends = {
        name: float(
            list(one.iter("{http://www.w3.org/2000/svg}polyline"))[-1].attrib["points"].split()[-1].split(",")[0]
        )
        for name, one in pictures.items()
    }
    low, high = 48.0, 238.0
    assert low < ends["a<b"] < low + 0.4 * (high - low) and ends["c"] == pytest.approx(high, abs=5)


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path)])
    assert "holds no results.json" in capsys.readouterr().err
