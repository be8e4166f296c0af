"""The plots of the report as plain data: forest plots, category bars, the guidance sweep, training curves."""

from __future__ import annotations

from typing import Any

from mmalign.compare.report.charts import Axis, bar_mark, interval_mark, line_chart
from mmalign.compare.report.costs import has_cost_curve, has_own_curve
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.numbers import describe_delta, signed
from mmalign.compare.systems.facts import COSTS, EVALUATION, OWN_REWARD

_UNINTERESTING = {"learning_rate", "epoch", "images_per_second", "memory_gb", *COSTS}
_FIRST = ("loss", "accuracy", "evaluation", "margin", "reward")
_MAX_CURVES = 12


def forest(comparison: Comparison, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each reward the differences from the baseline, and from the guidance control, on one axis."""
    panels = []
    for label, facts in document["rewards"].items():
        rows = []
        for name, system in document["systems"].items():
            for key, other in (("versus_baseline", comparison.baseline), ("versus_control", comparison.control)):
                if key in system:
                    paired = system[key][label]
                    rows.append({"system": name, "other": other, "control": key == "versus_control", "paired": paired})
        ends = [end for row in rows for end in (row["paired"]["delta_ci95"] or [row["paired"]["delta"]])]
        axis = Axis.over(ends, zero=True)
        for row in rows:
            paired = row["paired"]
            row |= {
                "mark": interval_mark(axis, paired["delta"], paired["delta_ci95"]),
                "trained_on": comparison.is_trained_on(row["system"], label),
                "text": describe_delta(paired, facts["digits"]),
            }
        panels.append(
            {
                "label": label,
                "caption": _caption(facts),
                "rows": rows,
                "zero": axis.percent(0.0),
                "ticks": axis.labels(),
            }
        )
    return panels


def _caption(facts: dict[str, Any]) -> str:
    if facts.get("neutral"):
        return "more →"
    return "better →" if facts["higher_is_better"] else "← better"


def categories(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each reward and category a bar for every system's mean and the differences from the baseline."""
    panels = []
    for label, facts in document["rewards"].items() if document["categories"] else ():
        systems = document["systems"]
        means = [value for system in systems.values() for value in system["rewards"][label]["by_category"].values()]
        pairs = [
            pair
            for system in systems.values()
            for pair in system.get("versus_baseline", {}).get(label, {}).get("by_category", {}).values()
        ]
        mean_axis = Axis.over(means, bars=True, padding=0.02)
        delta_axis = Axis.over((end for pair in pairs for end in pair["delta_ci95"] or [pair["delta"]]), zero=True)
        rows = [
            {
                "category": category,
                "prompts": count,
                "systems": [
                    _category_system(system, name, facts, category, mean_axis, delta_axis)
                    for name, system in systems.items()
                ],
            }
            for category, count in document["categories"].items()
        ]
        panels.append(
            {
                "label": label,
                "rows": rows,
                "mean_ticks": mean_axis.labels(),
                "delta_ticks": delta_axis.labels(),
                "delta_zero": delta_axis.percent(0.0),
            }
        )
    return panels


def sweep(comparison: Comparison) -> dict[str, Any] | None:
    """Return the guidance sweep as one small chart for each reward that chose the guidance."""
    record = comparison.sweep
    if record is None:
        return None
    charts = []
    for label in record["rewards"]:
        entries = sorted(record["points"], key=lambda entry: entry["guidance"])
        points = [(entry["guidance"], entry["rewards"][label]["mean"]) for entry in entries]
        intervals = [entry["rewards"][label]["ci95"] for entry in entries]
        chart = line_chart({record["system"]: points}, {record["system"]: intervals})
        chosen = [entry["guidance"] for entry in entries].index(record["chosen"])
        charts.append({"label": label, "chart": chart, "chosen": chart["lines"][0]["points"][chosen]})
    tried = ", ".join(f"{entry['guidance']:g}" for entry in record["points"])
    return {**record, "charts": charts, "tried": tried}


def curves(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a chart for each metric that the systems' training runs logged, the most informative ones first."""
    by_metric: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, facts in comparison.systems.items():
        if facts.control:
            continue
        for metric, points in facts.curves.items():
            # Metrics plotted against cost are not plotted against steps, whose cost differs between methods.
            elsewhere = (metric.startswith(EVALUATION) and has_cost_curve(facts)) or (
                metric.startswith(OWN_REWARD) and has_own_curve(facts)
            )
            if len(points) > 1 and metric not in _UNINTERESTING and not elsewhere:
                by_metric.setdefault(metric, {})[name] = [(float(step), value) for step, value in points]

    def rank(metric: str) -> tuple[int, str]:
        return next((i for i, word in enumerate(_FIRST) if word in metric.lower()), len(_FIRST)), metric

    chosen = sorted(by_metric, key=rank)[:_MAX_CURVES]
    return [{"metric": metric, "chart": line_chart(by_metric[metric])} for metric in chosen]


def _category_system(
    system: dict[str, Any], name: str, facts: dict[str, Any], category: str, mean_axis: Axis, delta_axis: Axis
) -> dict[str, Any]:
    label, digits = facts["label"], facts["digits"]
    mean = system["rewards"][label]["by_category"][category]
    row: dict[str, Any] = {
        "system": name,
        "mean": f"{mean:.{digits}f}",
        "bar": bar_mark(mean_axis, mean),
        "mark": None,
    }
    versus = system.get("versus_baseline", {}).get(label)
    if versus:
        pair = versus["by_category"][category]
        row["mark"] = interval_mark(delta_axis, pair["delta"], pair["delta_ci95"])
        row["delta"] = signed(pair["delta"], digits)
        row["text"] = describe_delta(pair, digits)
        row["direction"] = pair["direction"]
    return row
