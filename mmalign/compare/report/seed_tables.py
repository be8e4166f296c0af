"""The tables beside the summary: every training seed, what prompts leave open, training costs; every cell is text.

The report, its Markdown and LaTeX, and the console show the same tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.compare.results.numbers import describe_delta

ABSENT = "\N{EN DASH}"
GROUPS = ("reward", "measure")
"""Heads of first columns in which a repeated cell is written once."""
_COSTS = {
    "images_seen": "images seen",
    "reward_calls": "reward calls",
    "seconds": "wall time (s)",
    "memory_gb": "peak memory (GB)",
}


@dataclass(frozen=True)
class PlainTable:
    """A table of text; `name` is its identifier in links and page sections."""

    name: str
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def grouped_rows(self) -> list[list[str]]:
        """Return the rows with the first cell empty where it repeats the row above."""
        return name_once(self.rows) if self.head[0] in GROUPS else self.rows


def name_once(rows: list[list[str]]) -> list[list[str]]:
    """Empty the first cell where it repeats that of the row above."""
    above = [None, *(row[0] for row in rows)]
    return [["" if row[0] == previous else row[0], *row[1:]] for row, previous in zip(rows, above, strict=False)]


def more_tables(document: dict[str, Any]) -> dict[str, PlainTable]:
    """Return the tables for which results.json has data, by name."""
    tables = (_training_seeds(document), _open_attributes(document), _questions(document), _costs(document))
    return {table.name: table for table in tables if table.rows}


def _training_seeds(document: dict[str, Any]) -> PlainTable:
    """Return a row for each reward and system that was trained, a column for each training seed."""
    seeds = [str(seed) for seed in document.get("training_seeds", [])]
    rows = []
    for label, facts in document["rewards"].items():
        for name, system in document["systems"].items():
            if "training_seeds" not in system or "versus_baseline" not in system:
                continue
            by_seed = {seed: one["versus_baseline"][label] for seed, one in system["training_seeds"].items()}
            mark = " †" if system["rewards"][label]["trained_on"] else ""
            cells = [describe_delta(by_seed[seed], facts["digits"]) for seed in seeds]
            rows.append([label, name + mark, *cells, spread(system["versus_baseline"][label], facts["digits"])])
    note = (
        f"Difference from {document['baseline']} of each training seed alone, with its 95 % interval over "
        f"{document.get('over', 'prompts')}; "
        "sd: standard deviation of the difference over training seeds."
    )
    head = [
        "measure" if "item" in document else "reward",
        "system",
        *(f"training seed {seed}" for seed in seeds),
        "sd",
    ]
    return PlainTable("each-seed", "Each training seed", note, head, rows)


def _open_attributes(document: dict[str, Any]) -> PlainTable:
    """Return a row for each attribute that prompts leave open and each system."""
    rows = []
    for attribute, numbers in document.get("open_attributes", {}).items():
        for name, one in numbers["systems"].items():
            versus = one.get("versus_baseline")
            bits = _with_interval(one["bits"], one["ci95"])
            delta = describe_delta(versus, 2) if versus else ABSENT
            kept = versus and versus["share"] is not None
            share = _with_interval(versus["share"], versus["share_ci95"]) if kept else ABSENT
            first = f"{one['favourite']} {one['favourite_share']:.0%}"
            rows.append([f"{attribute} (of {numbers['most']:.2f})", name, bits, delta, share, first])
    base = document["baseline"]
    note = (
        "Entropy in bits, over the images, of what their prompts leave open, as it is read from the images; in "
        "brackets the bits of equal shares. Corrected for the number of images; intervals as above. "
        f"Far below {base}: a system draws one choice where it has several."
    )
    head = ["measure", "system", "bits [95 % CI]", f"Δ vs {base}", f"share of {base}'s", "most frequent"]
    return PlainTable("open-attributes", "What prompts leave open", note, head, rows)


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _questions(document: dict[str, Any]) -> PlainTable:
    """Return a row for temporal and static questions, each format, and twins, and each system."""
    numbers = document.get("questions", {})
    shares = {**numbers.get("by_kind", {}), **numbers.get("by_format", {})}
    parts = {f"{name} ({part['count']})": part for name, part in shares.items()}
    if "twins" in numbers:
        parts[f"twin accuracy ({numbers['twins']['count']} groups)"] = numbers["twins"]
    rows = []
    for measure, part in parts.items():
        for system, one in part["systems"].items():
            interval = one["ci95"] and f" [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]"
            versus = one.get("versus_baseline")
            delta = describe_delta(versus, 3) if versus else ABSENT
            rows.append([measure, system, f"{one['mean']:.3f}{interval or ''}", delta])
    note = (
        "Temporal questions need several frames; static ones are single-frame questions, about colour, shape and "
        "number. Twin accuracy: the share of groups of conflicting "
        "questions in which every answer is right."
    )
    head = ["measure", "system", "accuracy", f"Δ vs {document['baseline']}"]
    return PlainTable("formats", "By kind and format, and twins", note, head, rows)


def _costs(document: dict[str, Any]) -> PlainTable:
    """Return a row for each system that was trained, a column for each cost."""
    costs = {name: system["cost"] for name, system in document["systems"].items() if system.get("cost")}
    digits = {"memory_gb": 2}
    rows = [
        [name, *(f"{cost[key]:,.{digits.get(key, 0)}f}" if key in cost else ABSENT for key in _COSTS)]
        for name, cost in costs.items()
    ]
    seen = "answers that the model scored" if "item" in document else "those through the denoiser"
    several = "Means over the training seeds. " if document.get("training_seeds") else ""
    note = (
        f"{several}Images seen are {seen}, forward or backward each counting one; wall time "
        "leaves out evaluations; memory is the GPU's, or that of the process where there is none."
    )
    return PlainTable("cost-table", "Cost of training", note, ["system", *_COSTS.values()], rows)


def spread(versus: dict[str, Any] | None, digits: int) -> str:
    """Write the standard deviation of a difference over training seeds, if there are several."""
    return f"{versus['delta_sd']:.{digits}f}" if versus and "delta_sd" in versus else ""


def sizes(prompts: int, seeds: Sequence[int], training_seeds: Sequence[int] = (), item: str = "prompt") -> str:
    """Return what the means are over: "200 prompts × 2 seeds × 3 training seeds"; each question is asked once."""
    counts = {"seed": len(seeds) if item == "prompt" else 0, "training seed": len(training_seeds)}
    parts = [f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count]
    return " × ".join([f"{prompts} {item}s", *parts])
