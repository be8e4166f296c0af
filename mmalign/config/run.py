"""The configuration of a training run: a strict schema, and the one way to read it.

`load_config("shapes/diffusion_dpo", ["method.beta=2000"])` reads YAML with `extends:`, applies the overrides, fills in
the method's own defaults and reports all errors at once. `dump_config` writes the resolved result, which reads back
to the same run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmalign.config.checks import (
    check_numbers,
    check_recipe,
    describe_errors,
    generated_modality,
    method_class,
    takes_text,
)
from mmalign.config.flow import FlowConfig
from mmalign.config.issues import ConfigIssue
from mmalign.config.renamed import rename_keys
from mmalign.config.rounds import RoundsConfig
from mmalign.config.sections import (
    AdapterConfig,
    DataConfig,
    EvaluateConfig,
    MonitorConfig,
    Output,
    RewardConfig,
    StrictModel,
    TrainerConfig,
)
from mmalign.config.video import VideoConfig
from mmalign.config.yaml import ConfigIssues, Tree, dotted, read_tree, write_yaml

SchemaT = TypeVar("SchemaT", bound=BaseModel)
Source = str | Path | Mapping[str, Any]
"""Where a configuration comes from: a YAML file, a shipped name, or the values themselves."""


class RunConfig(StrictModel):
    """One training run, as `mmalign train` takes it."""

    model: str = Field(min_length=1)
    """a model directory, or a hub id 'organisation/name'"""
    allow_distilled: bool = False
    """train a model that was distilled to few sampling steps on its own samples, which undoes the distillation"""
    reference: str | None = Field(None, min_length=1)
    """model that the policy is compared with, of the same family; null: the one that training starts from"""
    method: dict[str, Any]
    """`name`, a name of `mmalign list methods`, and what that method's own configuration declares"""
    data: DataConfig
    """the training data"""
    output: Output
    """folder that the run writes to"""
    adapter: AdapterConfig = AdapterConfig()
    """which weights are trained"""
    rewards: list[RewardConfig] = []
    """rewards that the method learns from; only for methods that take them"""
    trainer: TrainerConfig = TrainerConfig()
    """the training loop"""
    rounds: RoundsConfig | None = None
    """repeat sampling, labelling and training; only for methods that learn from pairs or labels, null: train once"""
    evaluate: EvaluateConfig | None = None
    """evaluation on a few prompts or questions while training; null: none"""
    monitors: MonitorConfig = MonitorConfig()
    """alarms on the metrics of an online run"""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """attention kernel"""
    flow: FlowConfig | None = None
    """choices for flow models (SD3, FLUX, Z-Image, Qwen-Image): density of training levels, text length, embedded
    guidance; null: their defaults"""
    video: VideoConfig | None = None
    """geometry of the videos, for video models (Wan, LTX-Video), which must have the section; null: an image model"""

    @property
    def modality(self) -> str:
        """The kind of model that is trained: an "image" or "video" generator, or a "vlm" (vision-language model)."""
        return generated_modality(method_class(self.method)[0], self.video)

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
        UserError: the file cannot be read, or its contents are wrong: one line for each error, all of them.
    """
    return load_with_tree(source, overrides, sections)[0]


def load_with_tree(
    source: Source,
    overrides: Sequence[str] | None = None,
    sections: Mapping[str, Any] | None = None,
    *,
    foreign: bool = True,
) -> tuple[RunConfig, Tree]:
    """Like `load_config`, with the merged values and their origins as `mmalign show-config` prints them.

    Unless `foreign`, no module that a dotted path names is imported: the options of such a method stay as given.
    """
    takes = partial(takes_text, RunConfig, foreign=foreign)
    tree = read_tree(source, overrides or (), expand_short_forms, sections, takes)
    rename_keys(tree, RunConfig)
    chosen, issues = method_class(tree.values.get("method"), foreign)
    method = tree.values.get("method")
    if chosen:
        rename_keys(tree, chosen.Config, ("method",))
        method, issues = _validate_method(chosen.Config, tree.values["method"])
    config, run_issues = _validate(RunConfig, tree.values)
    issues = [*run_issues, *issues, *check_recipe(tree.values, foreign)]
    if issues or config is None:
        raise _report(issues, tree, source)
    return config.model_copy(update={"method": method}), tree


def load_schema(
    schema: type[SchemaT],
    source: Source,
    overrides: Sequence[str] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> SchemaT:
    """Read any other configuration (such as that of `mmalign compare`) by the same rules and with the same messages.

    Raises:
        UserError: see `load_config`.
    """
    tree = read_tree(source, overrides or (), expand_short_forms, sections, partial(takes_text, schema))
    rename_keys(tree, schema)
    config, issues = _validate(schema, tree.values)
    if issues or config is None:
        raise _report(issues, tree, source)
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


def _validate(schema: type[SchemaT], values: Any) -> tuple[SchemaT | None, list[ConfigIssue]]:
    issues = list(check_numbers(values))
    # Values go through JSON because pydantic's strict mode takes a list for a tuple and text for a path only there.
    try:
        config = schema.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        found = describe_errors(error, schema, values)
        told = {issue.path[:length] for issue in issues for length in range(1, len(issue.path) + 1)}
        return None, [*issues, *(issue for issue in found if issue.path not in told)]
    return (None if issues else config), issues


def _validate_method(schema: type[BaseModel], values: dict[str, Any]) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """Check `method` by the method's own Config and return it with the defaults filled in."""
    options = {key: value for key, value in values.items() if key != "name"}
    # A third party's Config may have forgotten to forbid unknown keys; a misspelt option must still be reported.
    strict = type(schema.__name__, (schema,), {"model_config": ConfigDict(extra="forbid")})
    config, issues = _validate(strict, options)
    if config is None:
        return {}, [ConfigIssue(("method", *issue.path), issue.message) for issue in issues]
    return {"name": values["name"], **config.model_dump(mode="json")}, []


def _report(issues: list[ConfigIssue], tree: Tree, source: Source) -> ConfigIssues:
    lines, name = [], "the config given" if isinstance(source, Mapping) else source
    for issue in issues:
        key = f"{dotted(issue.path)}: " if issue.path else ""
        lines.append(f"{tree.origin(issue.path) or name}: {key}{issue.message}")
    return ConfigIssues(lines)
