"""Turn scores into `results.json`: the numbers, and a verdict by held-out rewards alone.

A reward that a system was trained on shows how well the training worked, not whether the system is better: it is
marked and left out of the verdict. A held-out reward counts for a system if the 95 % interval of the paired difference
lies wholly on the better side, and against it if wholly on the worse side, and if that survives the correction for the
number of comparisons (`mmalign.compare.results.verdicts`). A neutral measure such as diversity is reported beside them
and decides nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.numbers import reward_digits
from mmalign.compare.results.open_attributes import entropy_results
from mmalign.compare.results.training_seeds import tile_pair
from mmalign.compare.results.verdicts import add_verdicts
from mmalign.compare.stats import Paired, compare_paired, direction, spread_of_deltas, summarise
from mmalign.compare.systems.facts import SystemFacts
from mmalign.core.files import write_atomically
from mmalign.core.io.spreadsheet import write_csv


def build_results(comparison: Comparison) -> dict[str, Any]:
    """Return the content of results.json."""
    document: dict[str, Any] = {
        "format": 1,
        "created": comparison.created,
        **({"item": comparison.item, "over": comparison.over} if comparison.units else {}),
        "prompts": len(comparison.prompts),
        "seeds": comparison.seeds,
        **({"training_seeds": comparison.training_seeds} if comparison.replicas else {}),
        "scope": comparison.scope,
        "baseline": comparison.baseline,
        "control": comparison.control,
        "categories": {name: len(rows) for name, rows in comparison.category_groups.items()},
        "systems": {name: _system(comparison, name) for name in comparison.systems},
        "rewards": {label: facts.as_dict() for label, facts in comparison.rewards.items()},
        "guidance_control": comparison.sweep,
        "settings": comparison.settings,
        "command": comparison.command,
    }
    if comparison.open_counts:
        document["open_attributes"] = entropy_results(comparison)
    for label, facts in document["rewards"].items():
        facts["digits"] = reward_digits(document["systems"], label)
    add_verdicts(comparison, document)
    return document


def write_results(document: dict[str, Any], path: Path) -> None:
    """Write results.json, whole or not at all."""
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def write_scores(comparison: Comparison, path: Path) -> None:
    """Write every single score as CSV: `index, prompt, category, seed, system, reward, score`.

    Where systems were trained from several seeds, `training_seed` follows: empty for those that were not.
    """
    buffer = io.StringIO()
    header = ["index", "prompt", "category", "seed", "system", "reward", "score"]
    rows: list[list[object]] = [[*header, *["training_seed"] * bool(comparison.replicas)]]
    for reward, by_system in comparison.scores.items():
        for system, scores in by_system.items():
            of_seeds: list[int | str] = [*comparison.replicas.get(system, {"": None})]
            columns = [(training, seed) for training in of_seeds for seed in comparison.seeds]
            for index, prompt in enumerate(comparison.prompts):
                for column, (training, seed) in enumerate(columns):
                    score = float(scores[index, column])
                    row = [index, prompt.text, prompt.category, seed, system, reward, score]
                    rows.append([*row, training] if comparison.replicas else row)
    write_csv(buffer, rows)
    write_atomically(path, buffer.getvalue())


def write_summary(document: dict[str, Any], path: Path) -> None:
    """Write a row for each reward, system and opponent as CSV: the numbers of the summary, unrounded.

    `p` is that of the difference, `p_holm` the same after the correction; empty where the difference is no claim.
    """
    buffer = io.StringIO()
    ends = ("", "_low", "_high")
    spans = [f"{name}{end}" for name in ("mean", "delta", "win_rate") for end in ends]
    last = ("delta_sd", "p", "p_holm", "survives_holm")
    rows: list[list[object]] = [["reward", "system", "trained_on", "against", *spans, *last]]
    opponents = {"versus_baseline": document["baseline"], "versus_control": document["control"]}
    for reward in document["rewards"]:
        for name, system in document["systems"].items():
            own = system["rewards"][reward]
            mean = [own["mean"], *(own["ci95"] or ["", ""])]
            start = [reward, name, own["trained_on"]]
            for key in [key for key in opponents if key in system] or [""]:
                one = system.get(key, {}).get(reward, {})
                delta = [one.get("delta", ""), *(one.get("delta_ci95") or ["", ""])]
                win = [one.get("win_rate", ""), *(one.get("ci95") or ["", ""])]
                rest = [one.get(name) for name in last]
                rows.append([*start, opponents.get(key, ""), *mean, *delta, *win, *rest])
    write_csv(buffer, rows)
    write_atomically(path, buffer.getvalue())


def _system(comparison: Comparison, name: str) -> dict[str, Any]:
    facts = comparison.systems[name]
    rewards = {}
    for reward, scores in comparison.scores.items():
        summary = summarise(
            scores[name],
            comparison.category_groups,
            replicas=comparison.replicas_in(scores[name]),
            units=comparison.units,
            resamples=comparison.resamples,
        )
        rewards[reward] = {"mean": summary.mean, "ci95": summary.ci95, "by_category": summary.by_category}
        rewards[reward]["trained_on"] = comparison.is_trained_on(name, reward)
    system: dict[str, Any] = {
        "model": facts.model,
        "fingerprint": facts.fingerprint,
        "guidance": None if facts.made else facts.guidance,
        "adapter_scale": facts.adapter_scale,
        "trained_on": facts.trained_on,
        "rewards": rewards,
    }
    if facts.cost:
        system["cost"] = facts.cost
    if facts.remark:
        system["remark"] = facts.remark
    if name != comparison.baseline:
        system["versus_baseline"] = _versus(comparison, name, comparison.baseline)
        if comparison.control and not facts.control:
            system["versus_control"] = _versus(comparison, name, comparison.control)
    if name in comparison.replicas:
        system["training_seeds"] = {
            str(seed): _replica(comparison, name, seed, replica) for seed, replica in comparison.replicas[name].items()
        }
    return system


def _replica(comparison: Comparison, name: str, seed: int, facts: SystemFacts) -> dict[str, Any]:
    """Return the result of one training seed, against the same seed of the baseline if that has several too."""
    replica: dict[str, Any] = {"model": facts.model, "fingerprint": facts.fingerprint, "cost": facts.cost}
    scores = {reward: comparison.scores_by_seed(name, reward)[seed] for reward in comparison.scores}
    summaries = {
        reward: summarise(own, units=comparison.units, resamples=comparison.resamples)
        for reward, own in scores.items()
    }
    replica["rewards"] = {reward: {"mean": one.mean, "ci95": one.ci95} for reward, one in summaries.items()}
    if name != comparison.baseline:
        replica["versus_baseline"] = {}
        for reward, own in scores.items():
            other = comparison.scores_by_seed(comparison.baseline, reward)
            against = other[seed] if other else comparison.scores[reward][comparison.baseline]
            replica["versus_baseline"][reward] = _pair(comparison, reward, own, against)
    return replica


def _versus(comparison: Comparison, name: str, other: str) -> dict[str, Any]:
    versus = {}
    for reward, scores in comparison.scores.items():
        versus[reward] = _pair(comparison, reward, scores[name], scores[other])
        versus[reward]["by_category"] = {
            category: _pair(comparison, reward, scores[name][rows], scores[other][rows], rows)
            for category, rows in comparison.category_groups.items()
        }
        tiled = tile_pair(scores[name], scores[other])
        if (replicas := comparison.replicas_in(tiled[0])) > 1:
            versus[reward]["delta_sd"] = spread_of_deltas(*tiled, replicas)
    return versus


def _pair(
    comparison: Comparison, reward: str, scores: np.ndarray, other: np.ndarray, rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compare two systems under one reward, on all prompts or on these rows alone."""
    facts = comparison.rewards[reward]
    higher_is_better = facts.higher_is_better
    units = comparison.units
    tiled = tile_pair(scores, other)
    paired: Paired = compare_paired(
        *tiled,
        higher_is_better=higher_is_better,
        replicas=comparison.replicas_in(tiled[0]),
        units=units if units is None or rows is None else [units[row] for row in rows],
        resamples=comparison.resamples,
    )
    better = 0 if facts.neutral else direction(paired, higher_is_better=higher_is_better)
    return {**vars(paired), "direction": better}
