"""The tables of the report as plain data, and the summary as Markdown and LaTeX to paste elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from mmalign.compare.report.seed_tables import ABSENT, GROUPS, PlainTable, name_once, sizes, spread
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.numbers import counted_direction, describe_p, signed

_LATEX = {
    **{character: f"\\{character}" for character in "_%&#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"$^\dagger$",
    "Δ": r"$\Delta$",
    "\N{MINUS SIGN}": "$-$",
}


def summary(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a block for each reward with a row for each system: formatted mean, differences and win rate."""
    blocks = []
    for label, facts in document["rewards"].items():
        rows, digits = [], facts["digits"]
        for name, system in document["systems"].items():
            reward = system["rewards"][label]
            mean, interval = _number(reward["mean"], reward["ci95"], digits)
            rows.append(
                {
                    "system": name,
                    "trained_on": reward["trained_on"],
                    "mean": mean,
                    "mean_ci": interval,
                    "baseline": _versus(system.get("versus_baseline", {}).get(label), digits),
                    "control": _versus(system.get("versus_control", {}).get(label), digits),
                }
            )
        blocks.append({"label": label, "facts": facts, "rows": rows})
    return blocks


def config_differences(comparison: Comparison) -> dict[str, Any] | None:
    """Return the training settings that differ between the systems that were trained; all of them if only one was."""
    own = {name: facts for name, facts in comparison.systems.items() if not facts.control}
    trained = {name: facts.run_config for name, facts in own.items() if facts.run_config}
    if not trained:
        return None
    keys = list(dict.fromkeys(key for config in trained.values() for key in config))
    rows = []
    for key in keys:
        cells = [_show(config[key]) if key in config else ABSENT for config in trained.values()]
        if len(trained) == 1 or len(set(cells)) > 1:
            rows.append({"key": key, "cells": cells})
    return {"systems": list(trained), "rows": rows, "equal": len(keys) - len(rows)}


def as_markdown(comparison: Comparison, blocks: list[dict[str, Any]], more: Iterable[PlainTable] = ()) -> str:
    """Write the summary as a Markdown table, and more tables after it."""
    head = summary_head(comparison.measure, comparison.baseline, blocks)
    lines = [*_markdown_rows(head, flat_rows(blocks)), "", _caption(comparison)]
    for table in more:
        lines += ["", f"**{table.title}**", "", *_markdown_rows(table.head, table.rows), "", table.note]
    return "\n".join(lines)


def as_latex(comparison: Comparison, blocks: list[dict[str, Any]], more: Iterable[PlainTable] = ()) -> str:
    """Write the summary as a LaTeX tabular (booktabs), and more tables after it."""
    spreads = [r"sd of $\Delta$"] if has_spread(blocks) else []
    head = [
        comparison.measure,
        "system",
        r"mean [95\% CI]",
        rf"$\Delta$ vs {_tex(comparison.baseline)}",
        *spreads,
        "$p$ (Holm)",
        "win rate",
    ]
    lines = [*_latex_rows(head, name_once(flat_rows(blocks))), f"% {_caption(comparison)}"]
    for table in more:
        lines += [
            "",
            *_latex_rows(list(map(_tex, table.head)), table.grouped_rows()),
            f"% {table.title}. {table.note}",
        ]
    return "\n".join(lines)


def has_spread(blocks: list[dict[str, Any]]) -> bool:
    """Tell whether any difference in a summary has a standard deviation over training seeds."""
    return any(row["baseline"] and row["baseline"]["sd"] for block in blocks for row in block["rows"])


def _markdown_rows(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in rows]


def _latex_rows(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write a tabular; where rewards or measures come first, a rule stands before each."""
    grouped = head[0] in GROUPS
    columns = "ll" if grouped else "l"
    lines = [rf"\begin{{tabular}}{{{columns.ljust(len(head), 'r')}}}", r"\toprule", " & ".join(head) + r" \\"]
    for position, cells in enumerate(rows):
        if position == 0 or (grouped and cells[0]):
            lines.append(r"\midrule")
        lines.append(" & ".join(map(_tex, cells)) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def summary_head(measure: str, baseline: str, blocks: list[dict[str, Any]]) -> list[str]:
    """Return the head of the rows that `flat_rows` returns."""
    spreads = ["sd of Δ"] if has_spread(blocks) else []
    delta = f"Δ vs {baseline} [95 % CI]"
    return [measure, "system", "mean [95 % CI]", delta, *spreads, "p (Holm)", "win rate [95 % CI]"]


def flat_rows(blocks: list[dict[str, Any]]) -> list[list[str]]:
    """Return the summary as rows of text, one for each reward and system."""
    rows, with_spread = [], has_spread(blocks)
    for block in blocks:
        for row in block["rows"]:
            versus = row["baseline"]
            rows.append(
                [
                    block["label"],
                    row["system"] + (" †" if row["trained_on"] else ""),
                    _joined(row["mean"], row["mean_ci"]),
                    _joined(versus["delta"], versus["delta_ci"]) if versus else ABSENT,
                    *([(versus and versus["sd"]) or ABSENT] if with_spread else []),
                    (versus and versus["p"]) or ABSENT,
                    _joined(versus["win"], versus["win_ci"]) if versus else ABSENT,
                ]
            )
    return rows


def _caption(comparison: Comparison) -> str:
    measured = sizes(len(comparison.prompts), comparison.seeds, comparison.training_seeds, comparison.item)
    several = len(comparison.training_seeds) > 1
    spreads = "sd: standard deviation of Δ over training seeds; " if several else ""
    return (
        f"{measured}; 95 % intervals: {describe_intervals(comparison)}; {spreads}p: of no difference, corrected for "
        "the number of held-out comparisons (Holm); a tie counts as half a win; † trained on this reward. "
        f"{comparison.scope}"
    )


def describe_intervals(comparison: Comparison) -> str:
    """Say what the intervals of a comparison are over, and how they are made."""
    bootstrap = f"paired bootstrap over {comparison.over}"
    if len(comparison.training_seeds) < 2:
        return bootstrap
    return f"over training seeds and {comparison.over} (crossed random effects); for one training {bootstrap}"


def _versus(paired: dict[str, Any] | None, digits: int) -> dict[str, Any] | None:
    if paired is None:
        return None
    delta_ci, win_ci = paired["delta_ci95"], paired["ci95"]
    return {
        "delta": signed(paired["delta"], digits),
        "delta_ci": f"[{signed(delta_ci[0], digits)}, {signed(delta_ci[1], digits)}]" if delta_ci else "",
        "direction": counted_direction(paired),
        "p": describe_p(paired),
        "sd": spread(paired, digits),
        "win": f"{paired['win_rate']:.2f}",
        "win_ci": f"[{win_ci[0]:.2f}, {win_ci[1]:.2f}]" if win_ci else "",
        "win_percent": round(100 * paired["win_rate"], 1),
        "counts": f"{paired['wins']} wins, {paired['losses']} losses, {paired['ties']} ties",
    }


def _number(value: float, interval: Any, digits: int) -> tuple[str, str]:
    return f"{value:.{digits}f}", f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""


def _joined(value: str, interval: str) -> str:
    return f"{value} {interval}".strip()


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match.group()], text)
