"""What is known of a model before it draws: a fingerprint of its weights, its training run, its training rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmalign.config_files import flatten
from mmalign.data.parquet import read_metadata
from mmalign.errors import UserError
from mmalign.resources import find, resolve_model
from mmalign.tracking import read_metrics
from pipelines import fingerprint_model

_MAX_LINEAGE = 8

Curves = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value) of a training run."""


@dataclass(frozen=True)
class SystemFacts:
    """One system of a comparison.

    `run_config` is the flattened resolved configuration of its training ("trainer.steps" -> 400), empty where there
    was none; `remark` says why `trained_on` may be incomplete; `control` marks the baseline at another guidance.
    """

    name: str
    model: str
    guidance: float
    fingerprint: str
    trained_on: list[str] = field(default_factory=list)
    run_config: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    remark: str = ""
    control: bool = False


def read_system(name: str, model: str, guidance: float, trained_on: list[str] | None = None) -> SystemFacts:
    """Collect the facts of a system; `trained_on` overrules what its directory says.

    Raises:
        UserError, PipelineError: the model does not exist, is no model, or its files contradict each other.
    """
    location = resolve_model(model)
    run_config = _run_config(Path(location))
    declared, remark = (trained_on, "") if trained_on is not None else find_trained_on(location)
    return SystemFacts(
        name=name,
        model=model,
        guidance=guidance,
        fingerprint=fingerprint_model(location, resolve=resolve_model),
        trained_on=list(declared),
        run_config=flatten(run_config),
        curves=read_curves(Path(location)),
        remark=remark,
    )


def find_trained_on(location: str) -> tuple[list[str], str]:
    """Return the rewards that a model was trained on, its ancestors' included, and a remark on what is unknown."""
    found: dict[str, None] = {}
    remarks: dict[str, None] = {}
    for _ in range(_MAX_LINEAGE):
        config = _run_config(Path(location))
        found |= dict.fromkeys(_reward_names(config.get("rewards")))
        data = config.get("data")
        pairs = (data.get("pairs") or data.get("labels")) if isinstance(data, dict) else None
        if pairs:
            named, remark = _pairs_rewards(str(pairs))
            found |= dict.fromkeys(named)
            remarks |= dict.fromkeys([remark] if remark else [])
        parent = config.get("model")
        if not isinstance(parent, str):
            break
        try:
            location = resolve_model(parent)
        except UserError:
            remarks[f"its starting model {parent} is not here any more"] = None
            break
    return list(found), "; ".join(remarks)


def read_curves(run: Path) -> Curves:
    """Return the numeric series of a training run's metrics; empty where there was none."""
    curves: Curves = {}
    for line in read_metrics(run):
        step = line.pop("step", None)
        for name, value in line.items() if isinstance(step, int) else ():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def _run_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration that training left beside a model, or nothing."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: not readable YAML; restore it, or remove it and state trained_on") from None
    return config if isinstance(config, dict) else {}


def _pairs_rewards(pairs: str) -> tuple[list[str], str]:
    """Return the rewards that labelled a set of pairs, or a remark that says why they are unknown."""
    try:
        path = find(pairs)
        metadata = read_metadata(path) if path.suffix == ".parquet" else {}
    except UserError:
        return [], f"its training pairs {pairs} are not here, so their reward is unknown"
    names = _reward_names(metadata.get("rewards") or metadata.get("reward"))
    return names, "" if names else f"its training pairs {pairs} name no reward"


def _reward_names(given: Any) -> list[str]:
    """Read `"clip"`, `["clip"]`, `[{"name": "clip", ...}]` or `{"clip": weight}` as a list of names."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping):
        return [given["name"]] if isinstance(given.get("name"), str) else [str(name) for name in given]
    if isinstance(given, list):
        return [name for one in given for name in _reward_names(one)]
    return []
