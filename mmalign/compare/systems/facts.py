"""Facts about a model: a fingerprint of its weights, its training run, its training rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmalign.config.yaml import flatten
from mmalign.core.errors import UserError
from mmalign.core.io.parquet import read_metadata
from mmalign.core.resources import find, resolve_model
from mmalign.training import rounds, stages
from mmalign.training.models import require_adapter
from mmalign.training.tracking import read_metrics
from pipelines import fingerprint_model

_MAX_LINEAGE = 8
EVALUATION = "evaluation/"
"""Prefix of the metrics of an evaluation on fixed prompts, before the reward's name."""
OWN_REWARD = "reward/"
"""Prefix of the metrics of what a method's own samples score while training, before the reward's name."""
COSTS = ("images_seen", "images_sampled", "reward_calls", "seconds")
"""What a run counts: images through the network, images sampled, images scored, and seconds without evaluations."""
MEMORY = "memory_gb"
"""The peak memory of a training run, in GB: the GPU's, or without one that of the process."""

Curves = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value) of a training run."""


@dataclass(frozen=True)
class SystemFacts:
    """One system of a comparison.

    `adapter_scale` is how much of its adapter is used. `run_config` is the flattened resolved configuration of its
    training ("trainer.steps" -> 400), empty where there was none. `evaluations` are those of its training, each a
    mapping of "evaluation/REWARD" to a mean and of `COSTS` to the training's cost up to then, taken at
    `evaluation_steps`; `cost` is its total cost, `MEMORY` included; all three are empty where that was not counted.
    `remark` says why `trained_on` may be incomplete; `control` marks the baseline at another guidance, `made` images
    from elsewhere, whose `model` is their folder and whose guidance is not known.
    """

    name: str
    model: str
    guidance: float
    fingerprint: str
    trained_on: list[str] = field(default_factory=list)
    run_config: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    adapter_scale: float = 1.0
    remark: str = ""
    control: bool = False
    evaluation_steps: list[int] = field(default_factory=list)
    made: bool = False

    def evaluation_at(self, step: int) -> dict[str, float]:
        """Return the last evaluation at a step of `evaluation_steps`."""
        return dict(zip(self.evaluation_steps, self.evaluations, strict=True))[step]


def read_system(
    name: str,
    model: str,
    guidance: float,
    trained_on: list[str] | None = None,
    adapter_scale: float = 1.0,
    identify: Callable[..., str] = fingerprint_model,
) -> SystemFacts:
    """Collect the facts of a system; `trained_on` overrides its directory.

    `identify` returns the fingerprint of this kind of model.

    Raises:
        UserError, PipelineError: the model does not exist, is not a model, has no adapter to scale, or its files
        contradict each other.
    """
    location = resolve_model(model)
    if adapter_scale != 1:
        require_adapter(model, f"system '{name}': adapter_scale {adapter_scale:g}", "train it with adapter.kind lora")
    metrics = _whole_metrics(Path(location))
    run_config = _run_config(Path(location))
    declared, remark = (trained_on, "") if trained_on is not None else find_trained_on(location)
    return SystemFacts(
        name=name,
        model=model,
        guidance=guidance,
        fingerprint=identify(location, resolve=resolve_model),
        trained_on=list(declared),
        run_config=flatten(run_config),
        curves=read_curves(metrics),
        evaluations=read_evaluations(metrics),
        evaluation_steps=[int(line["step"]) for line in metrics if _is_evaluation(line)],
        cost=read_cost(metrics),
        adapter_scale=adapter_scale,
        remark=remark,
    )


def find_trained_on(location: str) -> tuple[list[str], str]:
    """Return the rewards that a model was trained on, its ancestors' included, and a remark if some are unknown."""
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
            remarks[f"its starting model {parent} no longer exists"] = None
            break
    return list(found), "; ".join(remarks)


def read_curves(metrics: list[dict[str, Any]]) -> Curves:
    """Return the numeric series of a training run's lines of metrics."""
    curves: Curves = {}
    for line in metrics:
        values = _numbers(line)
        if "step" in values:
            step = int(values.pop("step"))
            for name, value in values.items():
                curves.setdefault(name, []).append((step, value))
    return curves


def read_evaluations(metrics: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the rewards of every evaluation with the training's cost up to then; empty where cost was not counted."""
    evaluations = [_numbers(line) for line in metrics if _is_evaluation(line)]
    return [
        {name: value for name, value in evaluation.items() if name in COSTS or name.startswith(EVALUATION)}
        for evaluation in evaluations
    ]


def _whole_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a training's lines of metrics after those of earlier stages or rounds, with steps and costs continued."""
    method = _run_config(folder / stages.FOLDER).get("method") or {}
    count = (_run_config(folder / rounds.FOLDER).get("rounds") or {}).get("count", 1)
    earlier = [folder / stages.FOLDER / str(stage) for stage in method.get("stages", [])[:-1]]
    earlier += [folder / rounds.FOLDER / str(number) for number in range(1, count)]
    # Rounds that ended early have the model of the last one in their folder too, with its config.
    parts = [part / "model" for part in earlier if _run_config(part / "model") != _run_config(folder)] + [folder]
    whole: list[dict[str, Any]] = []
    for part in parts:
        done = {name: max((line[name] for line in whole if name in line), default=0) for name in ("step", *COSTS)}
        for line in read_metrics(part):
            if line.get("step") or not done["step"]:  # where a stage starts, the one before has ended
                whole.append({name: value + done[name] if name in done else value for name, value in line.items()})
    return whole


def read_cost(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Return the total cost of a training run, by `COSTS` and `MEMORY`; empty where cost was not counted."""
    last: dict[str, Any] = next((line for line in reversed(metrics) if _is_counted(line)), {})
    # A resumed run counts its memory anew.
    peaks = [peak for line in metrics if last and (peak := _numbers(line).get(MEMORY))]
    cost = {name: value for name, value in _numbers(last).items() if name in COSTS}
    return cost | ({MEMORY: max(peaks)} if peaks else {})


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith(EVALUATION) for name in line) and _is_counted(line)


def _is_counted(line: Mapping[str, Any]) -> bool:
    # Every run logs seconds, but where nothing else is counted they include evaluations and restart on resuming.
    return "images_seen" in line


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if isinstance(value, int | float)}


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
    """Return the rewards that labelled a set of pairs, or a remark with the reason why they are unknown."""
    try:
        path = find(pairs)
        metadata = read_metadata(path) if path.suffix == ".parquet" else {}
    except UserError:
        return [], f"its training pairs {pairs} do not exist, so their reward is unknown"
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
