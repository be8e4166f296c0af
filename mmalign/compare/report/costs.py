"""Costs of the trained systems, and their held-out rewards against cost: charts for the report, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.compare.report.charts import line_chart
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.systems.facts import EVALUATION, SystemFacts

AXES = {"images_seen": "images seen", "reward_calls": "reward calls", "seconds": "seconds"}
"""Cost -> its unit in text; the report shows the first one by default."""
_BUDGETS = {"images": "images_seen"}  # limits whose name differs from the cost they limit


def describe_cost(cost: Mapping[str, float]) -> str:
    """Write a cost, or the one limit of a budget: "12,800 images seen, 95 seconds"; zeros are left out."""
    spent = {_BUDGETS.get(name, name): value for name, value in cost.items()}
    return ", ".join(f"{spent[name]:,.0f} {title}" for name, title in AXES.items() if spent.get(name)) or "nothing"


def has_cost_curve(facts: SystemFacts) -> bool:
    """Tell whether a system's training has evaluations of the system itself, with their cost."""
    return len(facts.evaluations) > 1 and facts.adapter_scale == 1 and not facts.control


def cost_curves(comparison: Comparison) -> dict[str, Any] | None:
    """Return a panel for each cost with a chart for each held-out reward; None if no training counted its cost.

    A chart holds one line a system, from the first evaluation to the last. `notes` name what is left out or not
    comparable.
    """
    shown = {name: facts for name, facts in comparison.systems.items() if has_cost_curve(facts)}
    named = (name for facts in shown.values() for evaluation in facts.evaluations for name in evaluation)
    rewards = dict.fromkeys(name for name in named if name.startswith(EVALUATION))
    panels = []
    for cost, title in AXES.items():
        charts = [_chart(comparison, shown, cost, reward) for reward in rewards]
        if charts := [chart for chart in charts if chart]:
            panels.append({"title": title, "charts": charts})
    if not panels:
        return None
    return {"panels": panels, "systems": list(shown), "notes": _notes(comparison, shown)}


def _chart(comparison: Comparison, shown: dict[str, SystemFacts], cost: str, reward: str) -> dict[str, Any] | None:
    """Return the chart of one reward against one cost; systems without this cost have no line."""
    lines, bands = {}, {}
    for name, facts in shown.items():
        points = [(one[cost], one[reward]) for one in facts.evaluations if cost in one and reward in one]
        if len({x for x, _ in points}) > 1:
            lines[name] = points
            bands[name] = _band(comparison, name, cost, reward)
    if not lines:
        return None
    label = reward.removeprefix(EVALUATION)
    return {
        "label": label,
        "chart": line_chart(lines, bands=bands),
        "trained_on": [name for name in lines if _is_trained_on(comparison, name, label)],
        "without": [name for name in shown if name not in lines],
    }


def _band(comparison: Comparison, name: str, cost: str, reward: str) -> list[tuple[float, float, float]]:
    """Return (mean cost, lowest, highest reward) over the training seeds of a system, evaluation by evaluation."""
    facts, replicas = comparison.systems[name], list(comparison.replicas.get(name, {}).values())
    if len(replicas) < 2:
        return []
    band = []
    for step, evaluation in zip(facts.evaluation_steps, facts.evaluations, strict=True):
        if cost in evaluation and reward in evaluation:
            values = [replica.evaluation_at(step)[reward] for replica in replicas]
            band.append((evaluation[cost], min(values), max(values)))
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
