"""Costs of the trained systems, and their rewards against cost: charts for the report, as plain data.

Two kinds of lines: the rewards of evaluations on held-out prompts, and those that a method's own samples earned while
training, by the prefix of their metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmalign.compare.report.charts import line_chart
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.systems.facts import COSTS, EVALUATION, OWN_REWARD, SystemFacts

AXES = {"images_seen": "images seen", "reward_calls": "reward calls", "seconds": "seconds"}
"""Cost -> its unit in text; the report shows the first one by default."""
OWN_AXES = {"images_sampled": "images drawn", "seconds": "seconds", "images_seen": "images seen"}
"""The same for the rewards of a method's own samples."""
_BUDGETS = {"images": "images_seen"}  # limits whose name differs from the cost they limit

Rows = dict[int, dict[str, float]]
"""Step -> metrics logged there, costs included."""


@dataclass(frozen=True)
class _Logged:
    """Metrics that systems logged beside their costs, whose names begin with `prefix`.

    `rows`: of each system, means over its training seeds; `replicas`: of each of its training seeds.
    """

    prefix: str
    rows: dict[str, Rows]
    replicas: dict[str, list[Rows]]


def describe_cost(cost: Mapping[str, float]) -> str:
    """Write a cost, or the one limit of a budget: "12,800 images seen, 95 seconds"; zeros are left out."""
    spent = {_BUDGETS.get(name, name): value for name, value in cost.items()}
    return ", ".join(f"{spent[name]:,.0f} {title}" for name, title in AXES.items() if spent.get(name)) or "nothing"


def has_cost_curve(facts: SystemFacts) -> bool:
    """Tell whether a system's training has evaluations of the system itself, with their cost."""
    return len(facts.evaluations) > 1 and facts.adapter_scale == 1 and not facts.control


def has_own_curve(facts: SystemFacts) -> bool:
    """Tell whether a system's training logged the rewards of its own samples with their cost."""
    return len(_own_rows(facts)) > 1 and not facts.control


def cost_curves(comparison: Comparison) -> dict[str, Any] | None:
    """Return a panel for each cost with a chart for each held-out reward; None if no training counted its cost.

    A chart holds one line a system, from the first evaluation to the last. `notes` name what is left out or not
    comparable.
    """
    shown = {name: facts for name, facts in comparison.systems.items() if has_cost_curve(facts)}
    logged = _read(comparison, shown, EVALUATION)
    return _panels(comparison, logged, AXES, _notes(comparison, shown))


def own_curves(comparison: Comparison) -> dict[str, Any] | None:
    """Return the same for the rewards that the methods' own samples earned while training; None if there are none."""
    shown = {name: facts for name, facts in comparison.systems.items() if has_own_curve(facts)}
    logged = _read(comparison, shown, OWN_REWARD)
    return _panels(comparison, logged, OWN_AXES, [])


def _read(comparison: Comparison, shown: Mapping[str, SystemFacts], prefix: str) -> _Logged:
    def read(facts: SystemFacts) -> Rows:
        if prefix == OWN_REWARD:
            return _own_rows(facts)
        return dict(zip(facts.evaluation_steps, facts.evaluations, strict=True))

    replicas = {name: list(comparison.replicas.get(name, {}).values()) for name in shown}
    return _Logged(
        prefix,
        {name: read(facts) for name, facts in shown.items()},
        {name: [read(one) for one in found] for name, found in replicas.items()},
    )


def _own_rows(facts: SystemFacts) -> Rows:
    """Return the steps at which a training logged rewards of its own samples, with costs."""
    rows: Rows = {}
    for name, points in facts.curves.items():
        if name in COSTS or name.startswith(OWN_REWARD):
            for step, value in points:
                rows.setdefault(step, {})[name] = value
    named = {step: row for step, row in rows.items() if any(name.startswith(OWN_REWARD) for name in row)}
    return {step: row for step, row in named.items() if "images_seen" in row}


def _panels(
    comparison: Comparison, logged: _Logged, axes: Mapping[str, str], notes: list[str]
) -> dict[str, Any] | None:
    names = (name for rows in logged.rows.values() for row in rows.values() for name in row)
    rewards = dict.fromkeys(name for name in names if name.startswith(logged.prefix))
    panels = []
    for cost, title in axes.items():
        charts = [_chart(comparison, logged, cost, reward) for reward in rewards]
        if charts := [chart for chart in charts if chart]:
            panels.append({"title": title, "charts": charts})
    return {"panels": panels, "systems": list(logged.rows), "notes": notes} if panels else None


def _chart(comparison: Comparison, logged: _Logged, cost: str, reward: str) -> dict[str, Any] | None:
    """Return the chart of one reward against one cost; systems without this cost have no line."""
    lines, bands = {}, {}
    for name, rows in logged.rows.items():
        points = [(row[cost], row[reward]) for row in rows.values() if cost in row and reward in row]
        if len({x for x, _ in points}) > 1:
            lines[name] = points
            bands[name] = _band(rows, logged.replicas[name], cost, reward)
    if not lines:
        return None
    label = reward.removeprefix(logged.prefix)
    return {
        "label": label,
        "chart": line_chart(lines, bands=bands),
        "trained_on": [name for name in lines if _is_trained_on(comparison, name, label)],
        "without": [name for name in logged.rows if name not in lines],
    }


def _band(rows: Rows, replicas: list[Rows], cost: str, reward: str) -> list[tuple[float, float, float]]:
    """Return (mean cost, lowest, highest reward) over the training seeds of a system, step by step."""
    if len(replicas) < 2:
        return []
    band = []
    for step, row in rows.items():
        if cost in row and reward in row:
            values = [replica[step][reward] for replica in replicas]
            band.append((row[cost], min(values), max(values)))
    return band


def _is_trained_on(comparison: Comparison, system: str, reward: str) -> bool:
    compared = [label for label, facts in comparison.rewards.items() if reward in (facts.name, facts.requested)]
    named = reward in comparison.systems[system].trained_on
    return named or any(comparison.is_trained_on(system, label) for label in compared)


def _notes(comparison: Comparison, shown: dict[str, SystemFacts]) -> list[str]:
    notes = []
    own = {name: facts for name, facts in comparison.systems.items() if not facts.control and facts.run_config}
    scaled = [name for name, facts in own.items() if facts.adapter_scale != 1]
    if scaled:
        notes.append(f"Left out: {', '.join(scaled)}, whose evaluations used another adapter scale.")
    uncounted = [name for name in own if name not in shown and name not in scaled]
    if uncounted:
        notes.append(f"Left out: {', '.join(uncounted)}, whose training logged no cost with its evaluations.")
    settings = {
        key: {str(facts.run_config.get(key)) for facts in shown.values()}
        for key in ("evaluate.prompts", "evaluate.limit", "evaluate.steps", "evaluate.guidance")
    }
    different = [key for key, values in settings.items() if len(values) > 1]
    if different:
        notes.append(f"The evaluations differ in {', '.join(different)}, so do not compare heights of lines.")
    return notes
