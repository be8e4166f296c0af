"""The tables of the report as plain data, and the summary as Markdown and LaTeX to paste elsewhere."""

from __future__ import annotations

import json
import re
from typing import Any

from mmalign.compare.results import Comparison, signed

_ABSENT = "\N{EN DASH}"
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
        cells = [_show(config[key]) if key in config else _ABSENT for config in trained.values()]
        if len(trained) == 1 or len(set(cells)) > 1:
            rows.append({"key": key, "cells": cells})
    return {"systems": list(trained), "rows": rows, "equal": len(keys) - len(rows)}


def as_markdown(comparison: Comparison, blocks: list[dict[str, Any]]) -> str:
    """Write the summary as a Markdown table."""
    lines = [
        f"| reward | system | mean [95 % CI] | Δ vs {comparison.baseline} [95 % CI] | win rate [95 % CI] |",
        "|---|---|---|---|---|",
    ]
    for cells in _flat_rows(blocks):
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, "", _caption(comparison)])


def as_latex(comparison: Comparison, blocks: list[dict[str, Any]]) -> str:
    """Write the summary as a LaTeX tabular (booktabs)."""
    head = ["reward", "system", r"mean [95\% CI]", rf"$\Delta$ vs {_tex(comparison.baseline)}", "win rate"]
    lines = [r"\begin{tabular}{llrrr}", r"\toprule", " & ".join(head) + r" \\"]
    previous = None
    for cells in _flat_rows(blocks):
        if cells[0] != previous:
            lines.append(r"\midrule")
        shown = [cells[0] if cells[0] != previous else "", *cells[1:]]
        lines.append(" & ".join(map(_tex, shown)) + r" \\")
        previous = cells[0]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {_caption(comparison)}"])


def _flat_rows(blocks: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for block in blocks:
        for row in block["rows"]:
            versus = row["baseline"]
            rows.append(
                [
                    block["label"],
                    row["system"] + (" †" if row["trained_on"] else ""),
                    _joined(row["mean"], row["mean_ci"]),
                    _joined(versus["delta"], versus["delta_ci"]) if versus else _ABSENT,
                    _joined(versus["win"], versus["win_ci"]) if versus else _ABSENT,
                ]
            )
    return rows


def _caption(comparison: Comparison) -> str:
    seeds = len(comparison.seeds)
    return (
        f"{len(comparison.prompts)} prompts × {seeds} seed{'s' * (seeds > 1)}; 95 % intervals: paired bootstrap over "
        "prompts; a tie counts as half a win; † trained on this reward."
    )


def _versus(paired: dict[str, Any] | None, digits: int) -> dict[str, Any] | None:
    if paired is None:
        return None
    delta_ci, win_ci = paired["delta_ci95"], paired["ci95"]
    return {
        "delta": signed(paired["delta"], digits),
        "delta_ci": f"[{signed(delta_ci[0], digits)}, {signed(delta_ci[1], digits)}]" if delta_ci else "",
        "direction": paired["direction"],
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
