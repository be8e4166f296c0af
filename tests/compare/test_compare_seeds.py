"""Systems trained from several seeds: what is trained and found, how replicas are paired, averaged and written."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, write_pairs

from mmalign.cli import main
from mmalign.compare.config import CompareConfig, make_compare_config
from mmalign.compare.report.console import print_summary
from mmalign.compare.report.costs import cost_curves, own_curves
from mmalign.compare.report.page import write_report
from mmalign.compare.report.seed_tables import more_tables
from mmalign.compare.report.tables import as_latex, as_markdown, summary
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.results import build_results, write_scores
from mmalign.compare.results.training_seeds import merge_facts
from mmalign.compare.scores import RewardFacts
from mmalign.compare.stats import spread_of_deltas
from mmalign.compare.systems.facts import SystemFacts, read_cost
from mmalign.compare.systems.training import plan_trainings, train_systems
from mmalign.config.run import load_config
from mmalign.core.errors import UserError
from mmalign.core.progress import memory_gigabytes, reset_peak_memory
from mmalign.data.prompts import Prompt
from mmalign.training import train as engine


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, pairs, prompts, a reward, and the training config "run.yaml" of one step."""
    folder = tmp_path_factory.mktemp("shared")
    build_tiny_sd(folder / "base", vae="tiny")
    pairs = write_pairs(folder / "pairs", count=4)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    run = {
        "model": str(folder / "base"),
        "method": "sft",
        "data": {"pairs": str(pairs), "cache": str(folder / "cache")},
        "adapter": {"kind": "lora", "rank": 2},
        "trainer": {"steps": 1, "batch_size": 2, "learning_rate": 0.01, "warmup": 0, "log_every": 1, "seed": 7},
        "evaluate": {"every": 1, "prompts": str(folder / "prompts.txt"), "rewards": [BRIGHTNESS],
                     "steps": 1},
        "output": "runs/sft",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def room(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of one test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(shared: Path, *more: dict[str, Any], overrides: tuple[str, ...] = (), **changes: Any) -> CompareConfig:
    values = {
        "systems": [
            {"name": "base", "model": str(shared / "base")},
            {"name": "sft", "train": str(shared / "run.yaml"), "overrides": list(overrides)},
            *more,
        ],
        "training_seeds": [7, 2],
        "prompts": str(shared / "prompts.txt"),
        "rewards": [BRIGHTNESS],
        "output": "out",
        "seeds": [0, 1],
        "steps": 1,
        "guidance": 2.0,
        "resamples": 100,
    }
    return make_compare_config(**{**values, **changes})


def test_each_seed_is_trained_drawn_scored_and_found_again(
    shared: Path, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (room / "compare.yaml").write_text(yaml.safe_dump(config_of(shared).model_dump(mode="json")))
    # The config's own seed trains where the config says; a finished training of it is found there.
    assert main(["train", str(shared / "run.yaml")]) == 0
    capsys.readouterr()
    assert main(["compare", str(room / "compare.yaml")]) == 0
    said = capsys.readouterr().err
    assert "1/2 sft (" in said and "trained already, in runs/sft\n" in said
    assert "2/2 sft-seed2 (" in said and "trains into runs/sft-seed2\n" in said
    assert [load_config(room / "runs" / one / "config.yaml").trainer.seed for one in ("sft", "sft-seed2")] == [7, 2]
    weights = "pytorch_lora_weights.safetensors"
    assert (room / "runs/sft" / weights).read_bytes() != (room / "runs/sft-seed2" / weights).read_bytes()

    def brightness(folder: str, index: int, seed: int) -> float:
        image = Image.open(room / "out" / "images" / folder / f"{index:04d}-{seed}.png")
        return float(np.asarray(image).mean() / 255)

    with (room / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 + 2 * 2 * 2  # prompts x seeds of the base, and x training seeds of the other
    folders = {"": "base", "7": "sft", "2": "sft-seed2"}
    for row in rows:
        expected = brightness(folders[row["training_seed"]], int(row["index"]), int(row["seed"]))
        assert float(row["score"]) == pytest.approx(expected, abs=1e-6)
    results = json.loads((room / "out" / "results.json").read_text())
    sft = results["systems"]["sft"]
    assert results["training_seeds"] == [7, 2] and "training_seeds" not in results["systems"]["base"]
    assert {seed: one["model"] for seed, one in sft["training_seeds"].items()} == {
        "7": "runs/sft", "2": "runs/sft-seed2"
    }  # fmt: skip
    (reward,) = results["rewards"]
    cells = [(i, s) for i in (0, 1) for s in (0, 1)]
    deltas = [
        np.mean([brightness(folder, *cell) - brightness("base", *cell) for cell in cells])
        for folder in ("sft", "sft-seed2")
    ]
    found = [one["versus_baseline"][reward]["delta"] for one in sft["training_seeds"].values()]
    assert found == pytest.approx(deltas, abs=1e-6)
    assert sft["versus_baseline"][reward]["delta"] == pytest.approx(np.mean(deltas), abs=1e-6)
    assert sft["versus_baseline"][reward]["delta_sd"] == pytest.approx(abs(deltas[0] - deltas[1]) / 2**0.5, abs=1e-6)
    costs = [one["cost"]["seconds"] for one in sft["training_seeds"].values()]
    assert sft["cost"]["seconds"] == pytest.approx(sum(costs) / 2) and sft["cost"]["memory_gb"] > 0

    monkeypatch.setattr(engine, "train", lambda *arguments: pytest.fail("trained what was there"))
    assert main(["compare", str(room / "out" / "config.yaml"), "--no-train"]) == 0


def test_adapter_scales_share_the_trainings_of_every_seed(shared: Path, room: Path) -> None:
    half = {"name": "half", "train": str(shared / "run.yaml"), "adapter_scale": 0.5}
    trainings = plan_trainings(config_of(shared, half))
    assert {str(one.config.output): one.systems for one in trainings} == {
        "runs/sft": ["sft", "half"],
        "runs/sft-seed2": ["sft-seed2", "half-seed2"],
    }


def test_seeds_other_than_the_configs_own_all_lie_beside_it(shared: Path, room: Path) -> None:
    trainings = plan_trainings(config_of(shared, training_seeds=[0, 1], overrides=("output=runs/it/",)))
    assert [(one.config.trainer.seed, one.config.output) for one in trainings] == [
        (0, "runs/it-seed0"), (1, "runs/it-seed1")
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        train_systems(config_of(shared, overrides=("trainer.stepz=1",)))
    assert str(caught.value).count("\n") == 0  # once, and not once a seed
    with pytest.raises(UserError, match="system 'sft-seed2': runs/sft-seed2 holds no finished training"):
        train_systems(config_of(shared), train=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_seeds": [1, 1]}, r"training_seeds: given \[1, 1\]; allowed: different whole numbers"),
        ({"training_seeds": [-1]}, r"training_seeds: given \[-1\]; allowed: different whole numbers of at least 0"),
        ({"training_seeds": []}, "training_seeds: List should have at least 1 item"),
        ({"overrides": ("trainer.seed=3",)}, "'sft' overrides trainer.seed=3, and training_seeds sets it; remove one"),
        ({"baseline": "sft-seed2"}, "no system is called 'sft-seed2'"),
    ],
)
def test_seeds_that_cannot_be(shared: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_of(shared, **changes)
    assert "\n" not in str(caught.value)


def test_names_of_replicas_are_not_those_of_systems(shared: Path) -> None:
    with pytest.raises(UserError, match="'sft-seed2' is what training seed 2 of 'sft' is called"):
        config_of(shared, {"name": "sft-seed2", "model": "m"})
    with pytest.raises(UserError, match="training_seeds: no system is trained here"):
        config_of(shared, systems=[{"name": "a", "model": "a"}, {"name": "b", "model": "b"}])


def facts(name: str) -> SystemFacts:
    return SystemFacts(name, f"runs/{name}", 4.0, "0" * 32)


def synthetic(scores: dict[str, np.ndarray], replicas: dict[str, list[int]], baseline: str = "base") -> Comparison:
    """Two prompts, two seeds, one reward."""
    reward = RewardFacts("r", "r", "r", "1", "", True, False, "", "", "")
    return Comparison(
        prompts=[Prompt("a"), Prompt("b")],
        seeds=[0, 1],
        baseline=baseline,
        systems={name: facts(name) for name in scores},
        replicas={name: {seed: facts(f"{name}{seed}") for seed in seeds} for name, seeds in replicas.items()},
        rewards={"r": reward},
        scores={"r": scores},
        image_paths={},
        resamples=100,
    )


BASE = np.array([[0.1, 0.2], [0.3, 0.4]])


def test_the_baseline_is_paired_with_every_replica() -> None:
    """Replicas gain 0.1, 0.2 and 0.6 over the baseline on prompt a, and 0 on b."""
    gain = np.array([[1.0], [0.0]])
    tuned = np.concatenate([BASE + size * gain for size in (0.1, 0.2, 0.6)], axis=1)
    document = build_results(synthetic({"base": BASE, "tuned": tuned}, {"tuned": [5, 0, 3]}))
    system = document["systems"]["tuned"]
    versus = system["versus_baseline"]["r"]
    assert versus["delta"] == pytest.approx((0.1 + 0.2 + 0.6) / 3 / 2)
    assert (versus["wins"], versus["losses"], versus["ties"]) == (6, 0, 6)
    # Of seeds: 0.05, 0.1, 0.3 have variance 0.0175; of prompts: 0.3 and 0 have 0.045, less the rest, 0.0175 of six.
    seeds, prompts = 0.0175 / 3, 0.045 / 2 - 0.035 / 6
    half = (4.302652730 * seeds + 12.706204736 * prompts) / (seeds + prompts) ** 0.5  # t with 2 and 1 degrees
    assert versus["delta_ci95"] == pytest.approx([0.15 - half, 0.15 + half])
    # Deltas 0.05, 0.1, 0.3 around 0.15: variance (0.1**2 + 0.05**2 + 0.15**2) / 2.
    assert versus["delta_sd"] == pytest.approx((0.035 / 2) ** 0.5)
    by_seed = {seed: one["versus_baseline"]["r"] for seed, one in system["training_seeds"].items()}
    assert {seed: one["delta"] for seed, one in by_seed.items()} == pytest.approx({"5": 0.05, "0": 0.1, "3": 0.3})
    assert by_seed["3"]["delta_ci95"] == pytest.approx([0.0, 0.6]) and "delta_sd" not in by_seed["3"]
    assert system["rewards"]["r"]["mean"] == pytest.approx(0.25 + 0.15)


def test_a_baseline_of_several_seeds_is_paired_seed_by_seed() -> None:
    base = np.concatenate([BASE, BASE + 0.4], axis=1)
    tuned = np.concatenate([BASE + 0.1, BASE + 0.2], axis=1)
    made = synthetic({"base": base, "tuned": tuned, "fixed": BASE}, {"base": [0, 1], "tuned": [0, 1]})
    systems = build_results(made)["systems"]
    deltas = {seed: one["versus_baseline"]["r"]["delta"] for seed, one in systems["tuned"]["training_seeds"].items()}
    assert deltas == pytest.approx({"0": 0.1, "1": -0.2})
    assert systems["tuned"]["versus_baseline"]["r"]["delta_sd"] == pytest.approx(0.3 / 2**0.5)
    # What was not trained meets each replica of the baseline: -0 and -0.4.
    assert systems["fixed"]["versus_baseline"]["r"]["delta"] == pytest.approx(-0.2)
    assert systems["fixed"]["versus_baseline"]["r"]["delta_sd"] == pytest.approx(0.4 / 2**0.5)
    assert "versus_baseline" not in systems["base"]["training_seeds"]["1"]


def test_one_training_seed_has_no_spread(tmp_path: Path) -> None:
    made = synthetic({"base": BASE, "tuned": BASE + 0.1}, {"tuned": [4]})
    tuned = build_results(made)["systems"]["tuned"]
    assert "delta_sd" not in tuned["versus_baseline"]["r"] and list(tuned["training_seeds"]) == ["4"]
    write_scores(made, tmp_path / "scores.csv")
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert (lines[0].split(",")[-1], lines[1], lines[5]) == (
        "training_seed",
        "0,a,,0,base,r,0.1,",
        "0,a,,0,tuned,r,0.2,4",
    )


def rendered(made: Comparison, folder: Path) -> tuple[dict[str, Any], str]:
    """Return results.json's content and the page of a comparison whose images are all grey."""
    Image.new("RGB", (8, 8), "grey").save(folder / "grey.png")
    made.image_paths = {name: [[folder / "grey.png"] * 2] * 2 for name in made.systems}
    document = build_results(made)
    write_report(made, document, "systems: []\n", folder / "report.html")
    return document, (folder / "report.html").read_text()


def test_every_training_seed_and_every_cost_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = np.concatenate([BASE + 0.1, BASE + 0.3], axis=1)
    made = synthetic({"base": BASE, "tuned": tuned}, {"tuned": [5, 0]})
    cost = {"images_seen": 12000.0, "images_sampled": 0.0, "reward_calls": 40.0, "seconds": 95.4, "memory_gb": 1.234}
    made.systems["tuned"] = replace(made.systems["tuned"], cost=cost)
    document, page = rendered(made, tmp_path)
    seeds, costs = (more_tables(document)[name] for name in ("each-seed", "cost-table"))
    assert seeds.head == ["reward", "system", "training seed 5", "training seed 0", "sd"]
    digits = document["rewards"]["r"]["digits"]
    # Every image gains as much, so the intervals have no width; the spread of 0.1 and 0.3 is 0.2 / sqrt(2).
    cells = [f"+{size:.{digits}f} [+{size:.{digits}f}, +{size:.{digits}f}]" for size in (0.1, 0.3)]
    assert seeds.rows == [["r", "tuned", *cells, f"{0.2 / 2**0.5:.{digits}f}"]]
    assert costs.head == ["system", "images seen", "reward calls", "wall time (s)", "peak memory (GB)"]
    assert costs.rows == [["tuned", "12,000", "40", "95", "1.23"]]
    blocks, tables = summary(document), more_tables(document).values()
    markdown, latex = as_markdown(made, blocks, tables), as_latex(made, blocks, tables)
    assert "2 prompts × 2 seeds × 2 training seeds; " in markdown and "over training seeds and prompts" in markdown
    assert "| tuned | 12,000 | 40 | 95 | 1.23 |" in markdown and f"| r | tuned | {cells[0]} | {cells[1]} |" in markdown
    assert r"tuned & 12,000 & 40 & 95 & 1.23 \\" in latex and latex.count(r"\end{tabular}") == 3
    print_summary(document, tmp_path / "report.html")
    printed = capsys.readouterr().out
    for text in (*cells, "Each training seed", "Cost of training", "12,000", "2 training seeds"):
        assert text in printed and text in (page if text != "2 training seeds" else markdown)
    assert 'id="each-seed"' in page and 'id="cost-table"' in page and 'over training seeds">sd</abbr>' in page


def test_without_training_seeds_nothing_of_them_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = synthetic({"base": BASE, "tuned": BASE + 0.1}, {})
    document, page = rendered(made, tmp_path)
    assert "training_seeds" not in json.dumps(document) and "delta_sd" not in json.dumps(document)
    print_summary(document, tmp_path / "report.html")
    texts = [page, capsys.readouterr().out, as_markdown(made, summary(document)), as_latex(made, summary(document))]
    assert not any("training seed" in text or 'id="each-seed"' in text for text in texts)
    write_scores(made, tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text().splitlines()[0] == "index,prompt,category,seed,system,reward,score"


def test_evaluations_of_several_seeds_are_a_line_within_a_band(tmp_path: Path) -> None:
    def replica(seed: int, values: list[float]) -> SystemFacts:
        evaluations = [{"images_seen": 10.0 * i, "evaluation/r": value} for i, value in enumerate(values)]
        return replace(facts(f"tuned{seed}"), evaluations=evaluations, evaluation_steps=[0, 1, 2])

    made = synthetic({"base": BASE, "tuned": np.tile(BASE, 2)}, {"tuned": [0, 1]})
    made.replicas["tuned"] = {0: replica(0, [0.0, 0.5, 1.0]), 1: replica(1, [0.0, 0.3, 0.0])}
    made.systems["tuned"] = merge_facts(made.replicas["tuned"])
    (line,) = cost_curves(made)["panels"][0]["charts"][0]["chart"]["lines"]
    corners = [tuple(map(float, corner.split(","))) for corner in line["band"].split()]
    low, high = corners[:3], corners[:2:-1]
    assert [x for x, _ in low] == [x for x, _ in high] == [x for x, _ in line["points"]]
    # Lowest 0, 0.3, 0; highest 0, 0.5, 1; the line 0, 0.4, 0.5 in the middle of both; y of SVG grows downwards.
    height = low[0][1] - high[2][1]
    bottom = low[0][1]
    assert [(bottom - y) / height for _, y in low] == pytest.approx([0.0, 0.3, 0.0], abs=0.01)
    assert [(bottom - y) / height for _, y in high] == pytest.approx([0.0, 0.5, 1.0], abs=0.01)
    assert [(bottom - y) / height for _, y in line["points"]] == pytest.approx([0.0, 0.4, 0.5], abs=0.01)
    assert '<polygon class="band"' in rendered(made, tmp_path)[1]


def test_rewards_of_own_samples_have_the_band_of_their_seeds() -> None:
    def replica(seed: int, values: list[float]) -> SystemFacts:
        curves = {"images_seen": [(step, 30.0 * step) for step in (1, 2, 3)]}
        return replace(facts(f"tuned{seed}"), curves=curves | {"reward/r": [*enumerate(values, start=1)]})

    made = synthetic({"base": BASE, "tuned": np.tile(BASE, 2)}, {"tuned": [0, 1]})
    made.replicas["tuned"] = {0: replica(0, [0.0, 0.5, 1.0]), 1: replica(1, [0.0, 0.3])}  # stopped earlier
    made.systems["tuned"] = merge_facts(made.replicas["tuned"])
    (line,) = own_curves(made)["panels"][0]["charts"][0]["chart"]["lines"]
    corners = [tuple(map(float, corner.split(","))) for corner in line["band"].split()]
    assert len(line["points"]) == 2 and len(corners) == 4
    height = corners[0][1] - corners[2][1]  # from 0 to the highest, 0.5
    assert [(corners[0][1] - y) / height for _, y in corners] == pytest.approx([0.0, 0.6, 1.0, 0.0], abs=0.01)
    assert (corners[0][1] - line["points"][1][1]) / height == pytest.approx(0.8, abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/self/clear_refs").exists(), reason="Linux, no GPU")
def test_peak_memory_starts_anew() -> None:
    held = np.ones(40_000_000)  # 0.32 GB
    before = memory_gigabytes()[0]
    assert held.sum() == 40_000_000
    del held
    reset_peak_memory()
    assert memory_gigabytes()[0] < before - 0.25


def test_memory_is_the_peak_of_all_lines_of_a_run_gone_on_with() -> None:
    counted = {"images_seen": 4, "images_sampled": 0, "reward_calls": 0, "seconds": 1.0}
    lines = [{"step": 1, "memory_gb": 3.5}, {"step": 2, "memory_gb": 2.5, **counted}]
    assert read_cost(lines)["memory_gb"] == 3.5
    assert read_cost([{"step": 1, "memory_gb": 3.5}]) == {}


def test_spread_is_over_replicas_and_not_over_prompts() -> None:
    scores = np.array([[1.0, 3.0, 2.0, 2.0], [5.0, 3.0, 4.0, 8.0]])  # means of the replicas: 3 and 4
    assert spread_of_deltas(scores, np.zeros_like(scores), 2) == pytest.approx(0.5**0.5)


def test_facts_of_replicas_are_averaged_where_all_of_them_have_one() -> None:
    def replica(seed: int, evaluations: dict[int, float], **cost: float) -> SystemFacts:
        return SystemFacts(
            "sft", f"runs/{seed}", 4.0, str(seed), run_config={"trainer.seed": seed, "trainer.steps": 9},
            curves={"loss": [(1, 1.0 * seed), (2, 2.0 * seed)][: 1 + seed % 2]},
            evaluations=[{"images_seen": 10.0 * step + seed, "evaluation/r": r} for step, r in evaluations.items()],
            evaluation_steps=list(evaluations), cost=cost,
        )  # fmt: skip

    merged = merge_facts({
        1: replica(1, {0: 0.1, 5: 0.2, 10: 0.3}, seconds=4.0, memory_gb=1.0),
        2: replica(2, {0: 0.3, 5: 0.6}, seconds=8.0),
    })  # fmt: skip
    assert (merged.model, merged.fingerprint) == ("runs/1", "1")
    assert merged.run_config == {"trainer.seed": [1, 2], "trainer.steps": 9}
    assert merged.curves == {"loss": [(1, 1.5)]}
    assert merged.evaluation_steps == [0, 5]
    assert [evaluation["evaluation/r"] for evaluation in merged.evaluations] == pytest.approx([0.2, 0.4])
    assert [evaluation["images_seen"] for evaluation in merged.evaluations] == [1.5, 51.5]
    assert merged.cost == {"seconds": 6.0}
