"""What is known of a model before it draws: a fingerprint of its weights, its training run, its training rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmalign.data.parquet import read_metadata
from mmalign.errors import UserError
from mmalign.resources import find, resolve_model
from mmalign.tracking import read_metrics
from pipelines.adapters import RECORD_NAME, WEIGHTS_NAME
from pipelines.load import INDEX, is_adapter_directory

_CHUNK = 1 << 22
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
        UserError: the model does not exist, is no model, or its files contradict each other.
    """
    location = resolve_model(model)
    run_config = _run_config(Path(location))
    declared, remark = (trained_on, "") if trained_on is not None else find_trained_on(location)
    return SystemFacts(
        name=name,
        model=model,
        guidance=guidance,
        fingerprint=fingerprint(location),
        trained_on=list(declared),
        run_config=flatten(run_config),
        curves=read_curves(Path(location)),
        remark=remark,
    )


def fingerprint(location: str) -> str:
    """Return 32 hex digits that change with the model's weights, tokenizer or scheduler, and with nothing else.

    A directory is read in full (logs, checkpoints and caches beside the model are not part of it), an adapter
    together with its base model; a hub id stands for the commit that it resolves to.

    Raises:
        UserError: the directory holds no model, or the hub cannot say which commit the id means.
    """
    folder = Path(location)
    if not folder.is_dir():
        return _digest([_hub_commit(location).encode()])
    if is_adapter_directory(folder):
        return _digest([fingerprint(read_base_model(folder)).encode(), *_contents([folder / WEIGHTS_NAME])])
    index = folder / INDEX
    if not index.is_file():
        raise UserError(
            f"{folder}: neither a diffusers model ({INDEX}) nor an adapter ({WEIGHTS_NAME}); "
            "give the directory that holds one of them"
        )
    parts = [folder / part for part in sorted(_read_json(index)) if (folder / part).is_dir()]
    files = sorted(path for part in parts for path in part.rglob("*") if path.is_file())
    return _digest(_contents([index, *files], folder))


def read_base_model(adapter: Path) -> str:
    """Return where the base model of an adapter directory is, found as `pipelines.load_generator` finds it.

    Raises:
        UserError: the directory does not say, or the model is not there.
    """
    record = adapter / RECORD_NAME
    base = _read_json(record).get("base_model") if record.is_file() else None
    if not isinstance(base, str):
        raise UserError(f'{adapter}: holds an adapter but no {RECORD_NAME} with {{"base_model": ...}}; add that file')
    beside = adapter / base
    return str(beside) if beside.is_dir() and not Path(base).exists() else resolve_model(base)


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested mappings as one level with dotted keys; lists of mappings get their index as a part."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(index): one for index, one in enumerate(value)}
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


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


def _hub_commit(model: str) -> str:
    from huggingface_hub import hf_hub_download

    name, _, revision = model.partition("@")
    try:
        index = hf_hub_download(name, "model_index.json", revision=revision or None)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {model}: not a directory here, and the hub did not give it: {reason}") from None
    return f"{name}@{Path(index).parent.name}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); copy the model again") from None
    return values if isinstance(values, dict) else {}


def _contents(files: list[Path], root: Path | None = None) -> Iterable[bytes]:
    for path in files:
        yield (path.relative_to(root).as_posix() if root else path.name).encode()
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                yield block


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
