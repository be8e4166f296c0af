"""The summary of a comparison on the console: one table, the verdicts and the path of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmalign.compare.report.seed_tables import GROUPS, PlainTable, more_tables, sizes, spread
from mmalign.compare.results.numbers import counted_direction, describe_delta, describe_p

_STYLES = {1: "green", -1: "red", 0: ""}


def print_summary(results: dict[str, Any], report: Path) -> None:
    """Print results.json's content as a table, a block of rows for each reward."""
    # On a pipe rich assumes 80 columns and would wrap the intervals.
    console = Console(width=None if Console().is_terminal else 132)
    console.print(summary_table(results))
    for table in more_tables(results).values():
        console.print()
        console.print(rich_table(table))
    if any(reward["trained_on"] for system in results["systems"].values() for reward in system["rewards"].values()):
        console.print("† the system was trained on this reward: no part of the verdict", style="dim")
    console.print(results["scope"], style="dim", markup=False, highlight=False)
    for verdicts in results["verdicts"].values():
        for verdict in verdicts.values():
            console.print(f"• {verdict['sentence']}", markup=False, highlight=False)
    sweep = results["guidance_control"]
    if sweep:
        by, where = " and ".join(sweep["rewards"]), f"{sweep['prompts']} prompts of {sweep['prompts_from']}"
        text = f"guidance control: {sweep['chosen']:g} is the baseline's best guidance by {by} on {where}"
        console.print(text, markup=False, highlight=False)
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)


def summary_table(results: dict[str, Any]) -> Table:
    """Return the table: reward, system, mean, difference from the baseline, win rate; each with its interval."""
    baseline = results["baseline"]
    item, over = results.get("item", "prompt"), results.get("over", "prompts")
    measured = sizes(results["prompts"], results["seeds"], results.get("training_seeds", []), item)
    deltas = [
        versus for system in results["systems"].values() for versus in system.get("versus_baseline", {}).values()
    ]
    with_spread = any("delta_sd" in versus for versus in deltas)
    if len(results.get("training_seeds", [])) > 1:
        over = f"training seeds and {over}"
    table = _plain(f"{measured}, 95 % intervals over {over}")
    table.add_column("reward" if item == "prompt" else "measure")
    table.add_column("system")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column(f"Δ vs {escape(baseline)}", justify="right", no_wrap=True)
    if with_spread:
        table.add_column("sd", justify="right", no_wrap=True)
    table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("win rate", justify="right", no_wrap=True)
    for label, facts in results["rewards"].items():
        arrow = "" if facts["higher_is_better"] else " (lower is better)"
        for position, (name, system) in enumerate(results["systems"].items()):
            reward = system["rewards"][label]
            versus = system.get("versus_baseline", {}).get(label)
            mark = " †" if reward["trained_on"] else ""
            delta, win = _versus_cells(versus, facts["digits"])
            style = _STYLES[counted_direction(versus)] if versus else ""
            first = escape(label) + arrow if position == 0 else ""
            table.add_row(
                first,
                escape(name) + mark,
                _mean_cell(reward, facts["digits"]),
                f"[{style}]{delta}[/]" if style else delta,
                *([spread(versus, facts["digits"])] if with_spread else []),
                escape(describe_p(versus)) if versus else "",
                win,
            )
        table.add_section()
    return table


def rich_table(plain: PlainTable) -> Table:
    """Return a table of text for the console."""
    table = _plain(plain.title)
    for title in plain.head:
        table.add_column(escape(title), justify="left" if title in (*GROUPS, "system") else "right")
    for cells in plain.grouped_rows():
        table.add_row(*map(escape, cells))
    return table


def _plain(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="dim", show_edge=False, pad_edge=False)


def _mean_cell(reward: dict[str, Any], digits: int) -> str:
    if reward["ci95"] is None:
        return f"{reward['mean']:.{digits}f}"
    low, high = reward["ci95"]
    return escape(f"{reward['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")


def _versus_cells(versus: dict[str, Any] | None, digits: int) -> tuple[str, str]:
    if versus is None:
        return "", ""
    win = f"{versus['win_rate']:.2f}"
    if versus["ci95"] is not None:
        low, high = versus["ci95"]
        win += f" [{low:.2f}, {high:.2f}]"
    return escape(describe_delta(versus, digits)), escape(win)
