"""Train from Python: a config or its values, data as objects; and what came out, as an object that shows itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.api import html
from mmalign.api.generate import Images, generate
from mmalign.api.objects import plain, write_labels, write_pairs, write_prompts
from mmalign.config.checks import SOURCES
from mmalign.config.run import RunConfig, load_config
from mmalign.core.errors import UserError
from mmalign.training.tracking import read_metrics

_SHOWN = ("loss", "accuracy", "reward")
_CURVES = 4


@dataclass(frozen=True)
class TrainResult:
    """A finished run: where its model is, what it was trained by, and its metrics. Usable wherever a model is named.

    path: the folder with the weights, the model card, config.yaml and metrics.jsonl.
    """

    path: Path
    config: RunConfig

    def __fspath__(self) -> str:
        """Return the folder, which is what a model is named by."""
        return str(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first: `step`, and what was logged at it, such as `loss`."""
        return read_metrics(self.path)

    def curve(self, name: str = "loss") -> list[tuple[int, float]]:
        """Return (step, value) of one metric, where it was logged and finite."""
        return [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]

    def generate(self, prompts: str | Sequence[str], **options: Any) -> Images:
        """Draw images with the trained model; see `mmalign.generate`."""
        return generate(self, prompts, **options)

    def _repr_html_(self) -> str:
        lines = self.metrics
        names = dict.fromkeys(key for line in lines for key in line)
        chosen = [name for name in names if name in _SHOWN or name.startswith("evaluation/")][:_CURVES]
        curves = "".join(html.curve(name, points) for name in chosen if (points := self.curve(name)))
        last: dict[str, Any] = {}
        for line in lines:
            last |= line
        facts = [("model", self.config.model), ("method", self.config.method_name), ("output", self.path)]
        facts += [(name, last[name]) for name in ("step", *chosen) if last.get(name) is not None]
        return f"<div>{html.table(['run', ''], facts)}{curves}</div>"


def train(
    config: str | Path | Mapping[str, Any] | RunConfig,
    *overrides: str,
    pairs: Iterable[Mapping[str, Any]] | str | Path | None = None,
    labels: Iterable[Mapping[str, Any]] | str | Path | None = None,
    prompts: Sequence[str] | str | Path | None = None,
    resume: str = "auto",
    **sections: Any,
) -> TrainResult:
    """Train as a configuration says, like `mmalign train`, and return the result.

    ```python
    result = mmalign.train(
        {"model": "assets/shapes-sd", "method": "diffusion_dpo"},
        pairs=[{"prompt": "a red circle", "chosen": good, "rejected": bad}, ...],  # PIL images
        trainer={"steps": 100},
        output="runs/mine",
    )
    result.generate("a red circle")
    ```

    Args:
        config: the name of a shipped config, a YAML file, the values that such a file would hold, or a `RunConfig`.
        overrides: `key.path=value`, as on the command line; applied last.
        pairs: rows with `prompt`, `chosen` and `rejected`, for vision-language models with texts and media; see
            `mmalign.api.objects.write_pairs`. Or the name of a source, as `data.pairs` takes it.
        labels: rows with `prompt`, `image` and `label` (good or bad); or the name of a source.
        prompts: texts, for methods that make their own samples; or the name of a set.
        resume: "auto" goes on from the last checkpoint in the output, "never" starts again, a path names one.
        sections: parts of the config, merged over it: `trainer={"steps": 100}`, `method="sft"`, `output="runs/x"`.
            A method may be a class of yours, and so may a reward; one that is defined in a notebook is known to this
            process alone, so that `config.yaml` of the run can be read again only where it is defined.

    Objects are written to `<output>/data/` under names made of their content, and the run learns from those files:
    the same call again finds the same data and goes on.

    Raises:
        UserError: the configuration or the data cannot work: one line a fault.
        TrainingDiverged: the loss is not finite. TrainingInterrupted: stopped; the same call again goes on.
    """
    from mmalign.training.train import train as train_run

    given = {"pairs": pairs, "labels": labels, "prompts": prompts}
    base, layer = _base(config), plain(sections, "the arguments")
    objects = {name: one for name, one in given.items() if one is not None and not _is_name(one)}
    named = {name: os.fspath(one) for name, one in given.items() if _is_name(one)}  # type: ignore[arg-type]
    if objects or named:
        placeholders = dict.fromkeys(SOURCES) | named | {name: f"<{name}>" for name in objects}
        layer["data"] = {**layer.get("data", {}), **placeholders, **(_OWN_COLUMNS if objects else {})}
    lists = [(holder, _take_prompt_lists(holder)) for holder in (base, layer) if isinstance(holder, dict)]
    checked = load_config(base, overrides, layer)
    output = Path(checked.output)
    for name, rows in objects.items():
        layer["data"][name] = _write(name, rows, output, answers=checked.modality == "vlm")
    for holder, found in lists:
        for section, texts in found.items():
            holder[section]["prompts"] = write_prompts(texts, output)
    if objects or any(found for _, found in lists):
        checked = load_config(base, overrides, layer)
    return TrainResult(train_run(checked, resume=resume), checked)


_OWN_COLUMNS: dict[str, Any] = {"caption_column": "caption", "columns": None}
"""Keys of the data that objects are written with, whatever the config says about other files."""


def _base(config: str | Path | Mapping[str, Any] | RunConfig) -> str | Path | Mapping[str, Any]:
    """Return a configuration in a form that can be read; a mapping must not name data twice."""
    if isinstance(config, RunConfig):
        return config.model_dump(mode="json")
    if isinstance(config, Mapping):
        values: Mapping[str, Any] = plain(config)
        return values
    if not isinstance(config, str | Path):
        raise UserError(f"config: a {type(config).__name__}; give the name of a config, its values, or a RunConfig")
    return config


def _is_name(value: Any) -> bool:
    return isinstance(value, str | Path)


def _take_prompt_lists(layer: dict[str, Any]) -> dict[str, list[str]]:
    """Take prompts out of `evaluate` and `rounds` where they are a list, and leave a name in their place."""
    found = {}
    for section in ("evaluate", "rounds"):
        part = layer.get(section)
        if isinstance(part, dict) and isinstance(part.get("prompts"), list):
            found[section] = part["prompts"]
            part["prompts"] = "<prompts>"
    return found


def _write(name: str, rows: Any, output: Path, *, answers: bool) -> str:
    if name == "pairs":
        return write_pairs(rows, output, answers=answers)
    return write_labels(rows, output) if name == "labels" else write_prompts(rows, output)
