"""Turn scores into `results.json`: the numbers, and a verdict by held-out rewards alone.

A reward that a system was trained on shows how well the training worked, not whether the system is better: it is
marked and left out of the verdict. A held-out reward counts for a system if the 95 % interval of the paired difference
lies wholly on the better side, and against it if wholly on the worse side. A neutral measure such as diversity
is reported beside them and decides nothing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.compare.results.training_seeds import Replicas, tile_pair
from mmalign.compare.scores import RewardFacts, Scores
from mmalign.compare.stats import (
    RESAMPLES,
    Paired,
    category_rows,
    compare_paired,
    direction,
    spread_of_deltas,
    summarise,
)
from mmalign.compare.systems.facts import SystemFacts
from mmalign.core.files import write_atomically
from mmalign.data.prompts import Prompt

CATEGORY_MISSING = "(none)"


@dataclass
class Comparison:
    """All measurements of a comparison; the report and results.json are views of it.

    scores: reward label -> system name -> `[prompts, seeds]`; `[prompts, replicas * seeds]` in the order of the
    `replicas` of a system that has them. `image_paths`: system name -> path of each (prompt, seed) of its first
    replica, row by row. `sweep` is the guidance control's record, `settings` and `command` go into the report as they
    are. `units`: for each prompt the name of what is resampled with it as one, called `over`; None:
    prompts are. `item` is what a prompt is called.
    """

    prompts: list[Prompt]
    seeds: list[int]
    baseline: str
    systems: dict[str, SystemFacts]
    rewards: dict[str, RewardFacts]
    scores: dict[str, Scores]
    image_paths: dict[str, list[list[Path]]]
    settings: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    command: str = ""
    created: str = ""
    resamples: int = RESAMPLES
    replicas: Replicas = field(default_factory=dict)
    units: list[str] | None = None
    item: str = "prompt"
    over: str = "prompts"

    @property
    def training_seeds(self) -> list[int]:
        """The seeds that systems were trained from; none where they were not named."""
        return list(next(iter(self.replicas.values()), {}))

    def scores_by_seed(self, system: str, reward: str) -> dict[int, np.ndarray]:
        """Return the scores `[prompts, seeds]` of each replica of a system, by training seed; empty without any."""
        seeds = self.replicas.get(system, {})
        parts = np.split(self.scores[reward][system], max(1, len(seeds)), axis=1)
        return dict(zip(seeds, parts, strict=False))

    @property
    def measure(self) -> str:
        """The heading in tables of the rewards or measures that compare systems."""
        return "reward" if self.item == "prompt" else "measure"

    @property
    def categories(self) -> list[str]:
        """The category of each prompt; all empty if the set has none."""
        if not any(prompt.category for prompt in self.prompts):
            return [""] * len(self.prompts)
        return [prompt.category or CATEGORY_MISSING for prompt in self.prompts]

    @property
    def control(self) -> str | None:
        """The name of the guidance control among the systems, if there is one."""
        return next((name for name, facts in self.systems.items() if facts.control), None)

    @property
    def challengers(self) -> list[str]:
        """The systems that are judged: all but the baseline and its control."""
        return [name for name, facts in self.systems.items() if name != self.baseline and not facts.control]

    def is_trained_on(self, system: str, reward: str) -> bool:
        """Tell whether a system was trained on a reward (by label, name or path), or on one it derives from."""
        facts = self.rewards[reward]
        same = {facts.label, facts.name, facts.requested, *facts.derived_from}
        return bool(same & set(self.systems[system].trained_on))


def build_results(comparison: Comparison) -> dict[str, Any]:
    """Return the content of results.json."""
    document: dict[str, Any] = {
        "format": 1,
        "created": comparison.created,
        **({"item": comparison.item, "over": comparison.over} if comparison.units else {}),
        "prompts": len(comparison.prompts),
        "seeds": comparison.seeds,
        **({"training_seeds": comparison.training_seeds} if comparison.replicas else {}),
        "baseline": comparison.baseline,
        "control": comparison.control,
        "categories": {name: len(rows) for name, rows in category_rows(comparison.categories).items() if name},
        "systems": {name: _system(comparison, name) for name in comparison.systems},
        "rewards": {label: facts.as_dict() for label, facts in comparison.rewards.items()},
        "guidance_control": comparison.sweep,
        "settings": comparison.settings,
        "command": comparison.command,
    }
    for label, facts in document["rewards"].items():
        facts["digits"] = reward_digits(document["systems"], label)
    document["verdicts"] = {name: _verdicts(comparison, document, name) for name in comparison.challengers}
    return document


def write_results(document: dict[str, Any], path: Path) -> None:
    """Write results.json, whole or not at all."""
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def write_scores(comparison: Comparison, path: Path) -> None:
    """Write every single score as CSV: `index, prompt, category, seed, system, reward, score`.

    Where systems were trained from several seeds, `training_seed` follows: empty for those that were not.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["index", "prompt", "category", "seed", "system", "reward", "score"]
    writer.writerow([*header, "training_seed"] if comparison.replicas else header)
    for reward, by_system in comparison.scores.items():
        for system, scores in by_system.items():
            of_seeds: list[int | str] = [*comparison.replicas.get(system, {"": None})]
            columns = [(training, seed) for training in of_seeds for seed in comparison.seeds]
            for index, prompt in enumerate(comparison.prompts):
                for column, (training, seed) in enumerate(columns):
                    score = repr(float(scores[index, column]))
                    row = [index, prompt.text, prompt.category, seed, system, reward, score]
                    writer.writerow([*row, training] if comparison.replicas else row)
    write_atomically(path, buffer.getvalue())


def _system(comparison: Comparison, name: str) -> dict[str, Any]:
    facts = comparison.systems[name]
    categories = comparison.categories if any(comparison.categories) else None
    rewards = {}
    for reward, scores in comparison.scores.items():
        summary = summarise(scores[name], categories, units=comparison.units, resamples=comparison.resamples)
        rewards[reward] = {"mean": summary.mean, "ci95": summary.ci95, "by_category": summary.by_category}
        rewards[reward]["trained_on"] = comparison.is_trained_on(name, reward)
    system: dict[str, Any] = {
        "model": facts.model,
        "fingerprint": facts.fingerprint,
        "guidance": facts.guidance,
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
    categories = category_rows(comparison.categories) if any(comparison.categories) else {}
    versus = {}
    for reward, scores in comparison.scores.items():
        versus[reward] = _pair(comparison, reward, scores[name], scores[other])
        versus[reward]["by_category"] = {
            category: _pair(comparison, reward, scores[name][rows], scores[other][rows], rows)
            for category, rows in categories.items()
        }
        replicas = max(scores[one].shape[1] for one in (name, other)) // len(comparison.seeds)
        if replicas > 1:
            tiled = tile_pair(scores[name], scores[other])
            versus[reward]["delta_sd"] = spread_of_deltas(*tiled, replicas)
    return versus


def _pair(
    comparison: Comparison, reward: str, scores: np.ndarray, other: np.ndarray, rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compare two systems under one reward, on all prompts or on these rows alone."""
    facts = comparison.rewards[reward]
    higher_is_better = facts.higher_is_better
    units = comparison.units
    paired: Paired = compare_paired(
        *tile_pair(scores, other),
        higher_is_better=higher_is_better,
        units=units if units is None or rows is None else [units[row] for row in rows],
        resamples=comparison.resamples,
    )
    better = 0 if facts.neutral else direction(paired, higher_is_better=higher_is_better)
    return {**vars(paired), "direction": better}


def _verdicts(comparison: Comparison, document: dict[str, Any], name: str) -> dict[str, Any]:
    """Judge one system against the baseline and, if there is one, against the guidance control."""
    verdicts = {"versus_baseline": _verdict(comparison, document, name, "versus_baseline")}
    if comparison.control:
        verdicts["versus_control"] = _verdict(comparison, document, name, "versus_control")
    return verdicts


def _verdict(comparison: Comparison, document: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    versus = document["systems"][name][key]
    other = comparison.control if key == "versus_control" else comparison.baseline
    judging = [reward for reward in versus if not comparison.rewards[reward].neutral]
    held_out = [reward for reward in judging if not comparison.is_trained_on(name, reward)]
    better = [reward for reward in held_out if versus[reward]["direction"] > 0]
    worse = [reward for reward in held_out if versus[reward]["direction"] < 0]
    digits = {label: facts["digits"] for label, facts in document["rewards"].items()}
    texts = {label: f"{label} ({describe_delta(paired, digits[label])})" for label, paired in versus.items()}
    if not held_out:
        outcome = "none"
    elif better and worse:
        outcome = "mixed"
    else:
        outcome = "better" if better else "worse" if worse else "inconclusive"
    return {
        "other": other,
        "outcome": outcome,
        "held_out": held_out,
        "better": better,
        "worse": worse,
        "sentence": _sentence(name, other, outcome, held_out, better, worse, texts),
    }


def _sentence(
    name: str,
    other: str | None,
    outcome: str,
    held_out: Sequence[str],
    better: Sequence[str],
    worse: Sequence[str],
    texts: dict[str, str],
) -> str:
    """Return the verdict as one sentence with the numbers behind it."""
    if outcome == "none":
        return f"No verdict on {name} against {other}: it was trained on every reward reported here."
    if outcome == "inconclusive":
        return f"No clear difference between {name} and {other} on {_listed(held_out, texts)}."
    rest = len(held_out) - len(better) - len(worse)
    tail = {0: ".", 1: "; the other held-out reward shows no clear difference."}.get(
        rest, f"; the other {rest} held-out rewards show no clear difference."
    )
    if outcome == "mixed":
        return f"{name} is better than {other} on {_listed(better, texts)}, but worse on {_listed(worse, texts)}{tail}"
    return f"{name} is {outcome} than {other} on {_listed(better or worse, texts)}{tail}"


def _listed(rewards: Sequence[str], texts: dict[str, str]) -> str:
    parts = [texts[reward] for reward in rewards]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe_delta(paired: dict[str, Any], digits: int) -> str:
    """Write a difference with its interval: "+0.043 [+0.021, +0.064]"."""
    if paired["delta_ci95"] is None:
        return f"{signed(paired['delta'], digits)}, no interval from one prompt"
    low, high = paired["delta_ci95"]
    return f"{signed(paired['delta'], digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def reward_digits(systems: dict[str, Any], label: str) -> int:
    """Return the number of decimals of a reward's numbers everywhere, as its intervals justify."""
    rewards = [system["rewards"][label] for system in systems.values()]
    means = [decimals(reward["mean"], reward["ci95"]) for reward in rewards]
    deltas = [system["versus_baseline"][label] for system in systems.values() if "versus_baseline" in system]
    wanted = [decimals(paired["delta"], paired["delta_ci95"]) for paired in deltas if paired["delta"]]
    return max(means[0], min([*wanted, means[0] + 1]))


def decimals(value: float, interval: Sequence[float] | None = None) -> int:
    """Return the number of decimals that shows two digits of a value's uncertainty, or three of a bare value."""
    width = (interval[1] - interval[0]) if interval else 0.0
    scale = width if width > 0 else abs(value) / 10
    if scale <= 0:
        return 3
    return int(min(6, max(0, 1 - np.floor(np.log10(scale)))))


def signed(value: float, digits: int) -> str:
    """Write a number with its sign, a true minus, and no sign on zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text
