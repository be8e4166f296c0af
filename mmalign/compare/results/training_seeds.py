"""A system trained from several seeds as one: its replicas' logs and costs averaged, their scores side by side.

Scores of a system are `[prompts, replicas * seeds]`, the columns of its first training seed first. A system that was
not trained here has one replica, which is compared with each replica of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mmalign.compare.scores import Scores
from mmalign.compare.systems.config import SystemsConfig
from mmalign.compare.systems.facts import SystemFacts

Replicas = dict[str, dict[int, SystemFacts]]
"""System -> training seed -> facts, for the systems with training seeds."""


def merge_systems(config: SystemsConfig, facts: dict[str, SystemFacts]) -> tuple[dict[str, SystemFacts], Replicas]:
    """Return the systems in the order of their facts, and the replicas of those with training seeds."""
    replicas: Replicas = {}
    for replica in config.replicas:
        if replica.seed is not None:
            replicas.setdefault(replica.system.name, {})[replica.seed] = facts[replica.name]
    own = {system.name for system in config.systems}
    systems = {
        name: merge_facts(replicas[name]) if name in replicas else one for name, one in facts.items() if name in own
    }
    return systems, replicas


def merge_facts(replicas: Mapping[int, SystemFacts]) -> SystemFacts:
    """Return a system's facts by training seed as one: those of the first, with means over all.

    Curves and evaluations are averaged at the steps that all of them reached.
    """
    first, *_ = facts = list(replicas.values())
    curves = {name: _mean_curve([one.curves.get(name, []) for one in facts]) for name in first.curves}
    steps = [step for step in first.evaluation_steps if all(step in one.evaluation_steps for one in facts)]
    return replace(
        first,
        run_config=first.run_config | {"trainer.seed": list(replicas)},
        curves={name: points for name, points in curves.items() if points},
        evaluations=[_mean(one.evaluation_at(step) for one in facts) for step in steps],
        evaluation_steps=steps,
        cost=_mean(one.cost for one in facts),
    )


def gather_scores(scores: Mapping[str, Scores], names: Mapping[str, Sequence[str]]) -> dict[str, Scores]:
    """Put the scores of each system's replicas, given by its name, side by side, reward by reward."""
    return {
        label: {system: np.concatenate([stores[name] for name in held], axis=1) for system, held in names.items()}
        for label, stores in scores.items()
    }


def tile_pair(
    scores: Float[np.ndarray, "prompts columns"], other: Float[np.ndarray, "prompts others"]
) -> tuple[Float[np.ndarray, "prompts most"], Float[np.ndarray, "prompts most"]]:
    """Repeat the one with fewer replicas, so that every column is paired with the other's same prompt and seed."""
    most = max(scores.shape[1], other.shape[1])
    first, second = (np.tile(one, (1, most // one.shape[1])) for one in (scores, other))
    return first, second


def _mean(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number that all of the mappings hold."""
    first, *others = values
    return {
        key: float(np.mean([value, *(one[key] for one in others)]))
        for key, value in first.items()
        if all(key in one for one in others)
    }


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    first, *others = [dict(curve) for curve in curves]
    steps = [step for step in first if all(step in other for other in others)]
    return [(step, float(np.mean([first[step], *(other[step] for other in others)]))) for step in steps]


def replica_names(systems: Sequence[str], replicas: Replicas) -> dict[str, list[str]]:
    """Return the names of every system's replicas, in the order of the training seeds."""
    return {name: [one.name for one in replicas[name].values()] if name in replicas else [name] for name in systems}
