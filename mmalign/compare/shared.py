"""The steps that all comparisons share: read the systems, describe the comparison, write the results."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.results import write_results, write_scores, write_summary
from mmalign.compare.systems.config import Replica, SystemsConfig
from mmalign.compare.systems.facts import SystemFacts
from mmalign.compare.systems.training import train_systems
from mmalign.config.run import dump_config
from mmalign.core.files import check_output, write_atomically
from mmalign.core.precision import check_precision
from mmalign.core.version import __version__


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison (`results` is the content of results.json) and the path of its report."""

    results: dict[str, Any]
    report: Path


def check_config(config: SystemsConfig) -> None:
    """Check, before any work, that the output can be written and that this machine has the precision.

    Raises:
        UserError: one of them fails.
    """
    check_output(Path(config.output), "output")
    check_precision(config.precision, key="precision")


def train_and_read(
    config: SystemsConfig, read: Callable[[Replica, str], SystemFacts], *, train: bool, retrain: bool
) -> dict[str, SystemFacts]:
    """Train the missing systems (see `train_systems`) and return the facts of all replicas, the baseline's first.

    `read` is called with a replica and its model.
    """
    models = train_systems(config, train=train, retrain=retrain)
    ordered = sorted(config.replicas, key=lambda one: one.system.name != config.baseline_name)
    return {replica.name: read(replica, models[replica.name]) for replica in ordered}


def described(config: SystemsConfig, *settings: str) -> dict[str, Any]:
    """Return the fields of a `Comparison` that depend on its config alone.

    `settings` are the keys that the numbers of this kind of comparison depend on, besides those of every kind; the
    report and results.json show them.
    """
    dumped = config.model_dump(exclude_none=True)
    shown = {key: dumped.get(key) for key in (*settings, "precision", "resamples")}
    budget = config.budget.model_dump(exclude_none=True) if config.budget else None
    return {
        "baseline": config.baseline_name,
        "settings": {**shown, "budget": budget, **_machine()},
        "command": f"mmalign compare {shlex.quote(str(Path(config.output) / 'config.yaml'))}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "resamples": config.resamples,
    }


def write_outcome(
    comparison: Comparison, results: dict[str, Any], config: SystemsConfig, gallery: dict[str, Any] | None = None
) -> Outcome:
    """Write scores.csv, config.yaml, the report (`gallery`: see `write_report`), summary.csv and results.json."""
    from mmalign.compare.report.page import write_report

    output, text = Path(config.output), dump_config(config)
    write_scores(comparison, output / "scores.csv")
    write_atomically(output / "config.yaml", text)
    write_report(comparison, results, text, output / "report.html", gallery)
    write_summary(results, output / "summary.csv")
    write_results(results, output / "results.json")
    return Outcome(results, output / "report.html")


def _machine() -> dict[str, Any]:
    """Return the device and the versions of the libraries."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {
            "mmalign": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "diffusers", "transformers")},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
