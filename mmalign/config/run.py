"""The configuration of a training run: a strict schema, and the one way to read it.

`load_config("shapes/diffusion_dpo", ["method.beta=2000"])` reads YAML with `extends:`, applies the overrides, fills in
the method's own defaults and reports every fault at once. `dump_config` writes the resolved result, which reads back
to the same run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mmalign.config.checks import Fault, check_recipe, describe_errors, method_class
from mmalign.config.sections import (
    AdapterConfig,
    DataConfig,
    EvaluateConfig,
    MonitorConfig,
    RewardConfig,
    RoundsConfig,
    StrictModel,
    TrainerConfig,
)
from mmalign.config.yaml import Faults, Tree, dotted, read_tree, write_yaml

SchemaT = TypeVar("SchemaT", bound=BaseModel)
Source = str | Path | Mapping[str, Any]
"""Where a configuration comes from: a YAML file, a shipped name, or the values themselves."""


class RunConfig(StrictModel):
    """One training run, as `mmalign train` takes it."""

    model: str
    """a model directory, or a hub id 'organisation/name'"""
    method: dict[str, Any]
    """`name`, a name of `mmalign list methods`, and what that method's own configuration declares"""
    data: DataConfig
    """what is learned from"""
    output: str
    """folder that the run writes to"""
    adapter: AdapterConfig = AdapterConfig()
    """what is trained"""
    rewards: list[RewardConfig] = []
    """rewards that the method learns from; only for methods that take them"""
    trainer: TrainerConfig = TrainerConfig()
    """the training loop"""
    rounds: RoundsConfig | None = None
    """repeat sampling, labelling and training; only for methods that learn from pairs or labels, null: train once"""
    evaluate: EvaluateConfig | None = None
    """a look at a few prompts while training; null: none"""
    monitors: MonitorConfig = MonitorConfig()
    """what an online run is watched for"""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """attention kernel"""

    @property
    def modality(self) -> str:
        """What kind of model the method trains: "image" and "video" models draw, a "vlm" looks and answers."""
        return str(method_class(self.method)[0].needs.modality)

    @property
    def method_name(self) -> str:
        """The method's name in the registry."""
        return str(self.method["name"])

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's own configuration, complete with defaults, without the name."""
        return {key: value for key, value in self.method.items() if key != "name"}


def load_config(
    source: Source, overrides: Sequence[str] | None = None, sections: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read, merge and check the configuration of a run.

    Args:
        source: a YAML file, the name of a shipped config such as "shapes/diffusion_dpo", or the values themselves.
        overrides: `key.path=value`, values in YAML: `method.beta=2000`, `rewards.0.weight=2`, `evaluate=null`.
        sections: values merged over those of the source, before the overrides: {"trainer": {"steps": 100}}.

    Raises:
        UserError: the file cannot be read, or anything in it is wrong: one line a fault, all of them.
    """
    return load_with_tree(source, overrides, sections)[0]


def load_with_tree(
    source: Source, overrides: Sequence[str] | None = None, sections: Mapping[str, Any] | None = None
) -> tuple[RunConfig, Tree]:
    """Like `load_config`, with the merged values and their origins as `mmalign show-config` prints them."""
    tree = read_tree(source, overrides or (), expand_short_forms, sections)
    config, faults = _validate(RunConfig, tree.values)
    method, method_faults = _validate_method(tree.values.get("method"))
    faults += method_faults
    faults += check_recipe(tree.values)
    if faults or config is None:
        raise _report(faults, tree, source)
    return config.model_copy(update={"method": method}), tree


def load_schema(
    schema: type[SchemaT],
    source: Source,
    overrides: Sequence[str] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> SchemaT:
    """Read any other configuration (such as that of `mmalign compare`) by the same rules, with the same messages.

    Raises:
        UserError: see `load_config`.
    """
    tree = read_tree(source, overrides or (), expand_short_forms, sections)
    config, faults = _validate(schema, tree.values)
    if faults or config is None:
        raise _report(faults, tree, source)
    return config


def dump_config(config: BaseModel) -> str:
    """Write a configuration as YAML with every default filled in; `load_config` reads it back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def expand_short_forms(values: dict[str, Any]) -> None:
    """Write `method: sft`, `diversity: clip` and `rewards: [clip]` in full, in place, where there are such keys."""
    for key in ("method", "diversity"):
        if isinstance(values.get(key), str):
            values[key] = {"name": values[key]}
    if isinstance(values.get("rewards"), list):
        values["rewards"] = [{"name": one} if isinstance(one, str) else one for one in values["rewards"]]


def _validate(schema: type[SchemaT], values: Any) -> tuple[SchemaT | None, list[Fault]]:
    # By way of JSON, since only there does pydantic's strict mode take a list for a tuple and text for a path.
    try:
        return schema.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        return None, describe_errors(error, schema, values)


def _validate_method(values: Any) -> tuple[dict[str, Any], list[Fault]]:
    """Check `method` by the method's own Config and return it with the defaults filled in."""
    method, faults = method_class(values)
    if method is None:
        return {}, faults
    options = {key: value for key, value in values.items() if key != "name"}
    # A third party's Config may have forgotten to forbid unknown keys; a misspelt option must not pass in silence.
    strict = type(method.Config.__name__, (method.Config,), {"model_config": ConfigDict(extra="forbid")})
    config, faults = _validate(strict, options)
    if config is None:
        return {}, [Fault(("method", *fault.path), fault.message) for fault in faults]
    return {"name": values["name"], **config.model_dump(mode="json")}, []


def _report(faults: list[Fault], tree: Tree, source: Source) -> Faults:
    lines, name = [], "the config given" if isinstance(source, Mapping) else source
    for fault in faults:
        key = f"{dotted(fault.path)}: " if fault.path else ""
        lines.append(f"{tree.origin(fault.path) or name}: {key}{fault.message}")
    return Faults(lines)
