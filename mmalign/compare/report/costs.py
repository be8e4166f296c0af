"""What the trained systems cost, and their held-out rewards against it: charts for the report, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.compare.report.charts import line_chart
from mmalign.compare.results.results import Comparison
from mmalign.compare.systems.facts import LOOK, SystemFacts

AXES = {"images_seen": "images seen", "reward_calls": "reward calls", "seconds": "seconds"}
"""Cost -> how it is written; the first is the one that the report shows at first."""
_BUDGETS = {"images": "images_seen"}  # where a limit is called otherwise than what it limits


def describe_cost(cost: Mapping[str, float]) -> str:
    """Write a cost, or the one limit of a budget: "12,800 images seen, 95 seconds"; what is zero is left out."""
    spent = {_BUDGETS.get(name, name): value for name, value in cost.items()}
    return ", ".join(f"{spent[name]:,.0f} {title}" for name, title in AXES.items() if spent.get(name)) or "nothing"


def has_cost_curve(facts: SystemFacts) -> bool:
    """Tell whether the looks of a system's training are about the system, and say what they had cost by then."""
    return len(facts.looks) > 1 and facts.adapter_scale == 1 and not facts.control


def cost_curves(comparison: Comparison) -> dict[str, Any] | None:
    """Return a panel for each cost with a chart for each held-out reward; None where no training counted its cost.

    A chart holds one line a system, from the first look to the last. `notes` say what is left out, or not comparable.
    """
    shown = {name: facts for name, facts in comparison.systems.items() if has_cost_curve(facts)}
    named = (name for facts in shown.values() for look in facts.looks for name in look)
    rewards = dict.fromkeys(name for name in named if name.startswith(LOOK))
    panels = []
    for cost, title in AXES.items():
        charts = [_chart(comparison, shown, cost, reward) for reward in rewards]
        if charts := [chart for chart in charts if chart]:
            panels.append({"title": title, "charts": charts})
    if not panels:
        return None
    return {"panels": panels, "systems": list(shown), "notes": _notes(comparison, shown)}


def _chart(comparison: Comparison, shown: dict[str, SystemFacts], cost: str, reward: str) -> dict[str, Any] | None:
    """Return the chart of one reward against one cost; systems that had no such cost have no line."""
    lines, bands = {}, {}
    for name, facts in shown.items():
        points = [(look[cost], look[reward]) for look in facts.looks if cost in look and reward in look]
        if len({x for x, _ in points}) > 1:
            lines[name] = points
            bands[name] = _band(comparison, name, cost, reward)
    if not lines:
        return None
    label = reward.removeprefix(LOOK)
    return {
        "label": label,
        "chart": line_chart(lines, bands=bands),
        "trained_on": [name for name in lines if _is_trained_on(comparison, name, label)],
        "without": [name for name in shown if name not in lines],
    }


def _band(comparison: Comparison, name: str, cost: str, reward: str) -> list[tuple[float, float, float]]:
    """Return (mean cost, lowest, highest reward) over the training seeds of a system, look by look."""
    facts, replicas = comparison.systems[name], list(comparison.replicas.get(name, {}).values())
    if len(replicas) < 2:
        return []
    band = []
    for step, look in zip(facts.look_steps, facts.looks, strict=True):
        if cost in look and reward in look:
            values = [replica.look_at(step)[reward] for replica in replicas]
            band.append((look[cost], min(values), max(values)))
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
        notes.append(f"Left out: {', '.join(scaled)}, whose looks were at another adapter scale.")
    uncounted = [name for name in own if name not in shown and name not in scaled]
    if uncounted:
        notes.append(f"Left out: {', '.join(uncounted)}, whose training logged no cost with its looks.")
    settings = {
        key: {str(facts.run_config.get(key)) for facts in shown.values()}
        for key in ("evaluate.prompts", "evaluate.limit", "evaluate.steps", "evaluate.guidance")
    }
    different = [key for key, values in settings.items() if len(values) > 1]
    if different:
        notes.append(f"The looks differ in {', '.join(different)}, so heights of different lines do not compare.")
    return notes
