"""Claims corrected for their number: what survives, what is said of the rest, and where it is shown."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.api.compare import ComparisonResult
from mmalign.compare.report.console import print_summary
from mmalign.compare.report.page import write_report
from mmalign.compare.report.tables import as_latex, as_markdown, summary
from mmalign.compare.results import Comparison, build_results, write_summary
from mmalign.compare.scores import RewardFacts
from mmalign.compare.systems.facts import SystemFacts
from mmalign.data.prompts import Prompt

PROMPTS = 80
STANDARD_ERRORS = {"sure": 8.0, "slight": 2.3, "none": 0.3, "seen": 9.0}


def differences(standard_errors: float) -> np.ndarray:
    """Differences of which the mean is so many standard errors from zero."""
    values = np.random.default_rng(0).normal(size=PROMPTS)
    values = (values - values.mean()) / values.std()
    return (values + standard_errors / PROMPTS**0.5)[:, None]


def made(tmp_path: Path, systems: int = 1, training_seeds: int = 1) -> Comparison:
    """Systems that differ from the base so surely by each reward; "seen" is trained on."""
    Image.new("RGB", (8, 8), "grey").save(tmp_path / "grey.png")
    names = ["base", *(f"dpo{index}" for index in range(systems))]
    trained_on = {name: ["seen"] if name != "base" else [] for name in names}
    facts = {name: SystemFacts(name, name, 4.0, "0" * 32, trained_on[name]) for name in names}
    several = {seed: facts["dpo0"] for seed in range(training_seeds)}
    base = np.zeros((PROMPTS, 1))
    scores = {
        label: {name: base if name == "base" else base + differences(sure) for name in names}
        for label, sure in STANDARD_ERRORS.items()
    }
    if training_seeds > 1:
        for by_system in scores.values():
            by_system["dpo0"] = np.tile(by_system["dpo0"], (1, training_seeds))
    return Comparison(
        prompts=[Prompt(f"prompt {index}") for index in range(PROMPTS)],
        seeds=[0],
        baseline="base",
        systems=facts,
        rewards={label: RewardFacts(label, label, label, "1", "", True, False, "", "", "") for label in scores},
        scores=scores,
        image_paths={name: [[tmp_path / "grey.png"]] * PROMPTS for name in names},
        replicas={"dpo0": several} if training_seeds > 1 else {},
    )


def test_claims_are_corrected_for_rewards_and_systems(tmp_path: Path) -> None:
    document = build_results(made(tmp_path))
    versus = document["systems"]["dpo0"]["versus_baseline"]
    raw = {label: versus[label]["p"] for label in versus}
    assert 0.01 < raw["slight"] < 0.05 < raw["none"]
    assert {label: one["direction"] for label, one in versus.items()} == {"sure": 1, "slight": 1, "none": 0, "seen": 1}
    # Three claims, since "seen" is none: the least p-value counts three times, the next twice.
    assert document["comparisons"] == {"versus_baseline": 3} and "p_holm" not in versus["seen"]
    adjusted = [versus[label]["p_holm"] for label in ("sure", "slight", "none")]
    assert adjusted == pytest.approx([3 * raw["sure"], 2 * raw["slight"], raw["none"]])
    assert [versus[label]["survives_holm"] for label in ("sure", "slight", "none")] == [
        True,
        adjusted[1] <= 0.05,
        False,
    ]
    # The same twice over are six claims.
    both = build_results(made(tmp_path, systems=2))
    assert both["comparisons"] == {"versus_baseline": 6}
    for name in ("dpo0", "dpo1"):
        slight = both["systems"][name]["versus_baseline"]["slight"]
        assert slight["p_holm"] == pytest.approx(4 * raw["slight"]) and not slight["survives_holm"]
        assert slight["delta_ci95"] == versus["slight"]["delta_ci95"]  # the interval stays


def test_the_verdict_counts_what_survives_and_names_what_falls(tmp_path: Path) -> None:
    verdict = build_results(made(tmp_path, systems=2))["verdicts"]["dpo0"]["versus_baseline"]
    assert (verdict["outcome"], verdict["better"], verdict["uncorrected"]) == ("better", ["sure"], ["slight"])
    assert verdict["sentence"].startswith("dpo0 is better than base on sure (+")
    assert "; the other 2 held-out rewards show no clear difference. The interval on slight (+" in verdict["sentence"]
    assert verdict["sentence"].endswith("]) excludes zero, but not after Holm's correction for 6 comparisons.")
    comparison = made(tmp_path, systems=2)
    del comparison.scores["sure"], comparison.rewards["sure"]
    verdict = build_results(comparison)["verdicts"]["dpo0"]["versus_baseline"]
    assert (verdict["outcome"], verdict["better"], verdict["uncorrected"]) == ("inconclusive", [], ["slight"])


def test_every_view_shows_interval_and_correction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = made(tmp_path, systems=2)
    document = build_results(comparison)
    blocks = summary(document)
    coloured = [
        (one["label"], row["system"]) for one in blocks for row in one["rows"][1:] if row["baseline"]["direction"]
    ]
    assert coloured == [("sure", "dpo0"), ("sure", "dpo1")]
    write_report(comparison, document, "systems: []\n", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="number good"') == 2 and ">p (Holm)</abbr>" in page
    assert "(6 of them)" in page and "survive it and decide the verdict" in page
    p = f"{document['systems']['dpo0']['versus_baseline']['slight']['p_holm']:.3f}"
    rows = ComparisonResult(document, tmp_path / "report.html").table
    by_cell = {(row["reward"], row["system"]): row["p (Holm)"] for row in rows}
    assert (by_cell["slight", "base"], by_cell["slight", "dpo0"], by_cell["seen", "dpo0 †"]) == ("–", p, "–")
    print_summary(document, tmp_path / "report.html")
    printed = capsys.readouterr().out
    markdown, latex = as_markdown(comparison, blocks), as_latex(comparison, blocks)
    for text in (p, "p (Holm)"):
        assert text in printed and text in markdown
    assert p in latex and "$p$ (Holm)" in latex
    write_summary(document, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        lines = {(row["reward"], row["system"]): row for row in csv.DictReader(file)}
    slight: dict[str, Any] = document["systems"]["dpo0"]["versus_baseline"]["slight"]
    row = lines["slight", "dpo0"]
    assert (row["against"], row["survives_holm"], row["trained_on"]) == ("base", "False", "False")
    assert [float(row[key]) for key in ("delta", "delta_low", "delta_high", "p", "p_holm")] == [
        slight["delta"], *slight["delta_ci95"], slight["p"], slight["p_holm"]
    ]  # fmt: skip
    assert lines["seen", "dpo0"]["p_holm"] == "" and lines["sure", "base"]["delta"] == ""


def test_one_training_is_not_its_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = made(tmp_path)
    document = build_results(comparison)
    said = "interval is for this one training on other prompts, not for its method"
    write_report(comparison, document, "systems: []\n", tmp_path / "report.html")
    print_summary(document, tmp_path / "report.html")
    outcome = ComparisonResult(document, tmp_path / "report.html")
    assert outcome.scope == document["scope"]
    views = [(tmp_path / "report.html").read_text(), outcome._repr_html_(), " ".join(capsys.readouterr().out.split())]
    for view in (*views, as_markdown(comparison, summary(document)), document["scope"]):
        assert said in view
    several = build_results(made(tmp_path, systems=2, training_seeds=2))
    assert several["scope"] == (
        "Intervals of dpo0 are for other trainings and other prompts. Those of dpo1 are for one model each, not for "
        "its method."
    )
