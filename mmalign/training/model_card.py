"""The model card of a finished run: its base, data, method and result, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mmalign.config.run import RunConfig, dump_config
from mmalign.core.files import write_atomically
from mmalign.core.io.tables import TABLE_SUFFIXES
from mmalign.core.resources import is_hub_id
from mmalign.core.version import __version__
from mmalign.training.output import CARD_FILE
from mmalign.training.tasks import task_of
from mmalign.training.tracking import read_metrics
from pipelines.lora_files import KOHYA_NAME


def write_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> None:
    """Write the model card README.md beside the weights."""
    write_atomically(output / CARD_FILE, model_card(config, output, facts))


def model_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> str:
    """Return the model card: the Hub's metadata, then base, data, method, numbers, seeds and how to load it.

    `facts` are further rows of the table of facts, name -> value. The metadata names base model and data only where
    they are the Hub's: a path would be no valid id there; the table of facts names them as they were given.
    """
    method, lora = config.method_name, config.adapter.kind == "lora"
    task = task_of(config)
    tag = task.pipeline_tag(config.model)
    data = config.data.pairs or config.data.labels or config.data.prompts
    metadata = ModelCardData(
        base_model=config.model.partition("@")[0] if is_hub_id(config.model) else None,
        datasets=_hub_data(data),
        library_name=task.card.library,
        pipeline_tag=tag,
        license="other",
        license_name="as-base-model",
        tags=["mmalign", method, tag, *(["lora"] if lora else [])],
    )
    rows = {
        "base model": f"`{config.model}`",
        "method": f"`{method}`, {_options(config.method_options)}",
        "data": f"`{data}`",
        "trained": _adapter(config) if lora else task.card.all_weights,
        **({"for ComfyUI, Forge and kohya": f"`{KOHYA_NAME}`"} if lora and (output / KOHYA_NAME).is_file() else {}),
        "exported weights": f"moving average ({config.trainer.ema:g})" if config.trainer.ema else "last step",
        "seed": config.trainer.seed,
        **facts,
        "licence": "that of the base model, as far as it and the data allow; state it here before publishing",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = "\n".join(
        [
            "---",
            metadata.to_yaml(),
            "---",
            "",
            f"# {output.name}",
            "",
            f"Fine-tuned from `{config.model}` with mmalign {__version__}, method `{method}`.",
            "",
            "| | |\n|---|---|\n" + table,
            "",
            *_evaluation_section(config, output),
            "## Use",
            "",
            "```python",
            *task.usage(config.model, output, lora=lora),
            "```",
            "",
            "## Config",
            "",
            "```yaml",
            dump_config(config).rstrip(),
            "```",
            "",
        ]
    )
    return str(ModelCard(text).content)  # which reads the metadata again, and refuses what is not valid


def _adapter(config: RunConfig) -> str:
    return f"LoRA, from `{config.adapter.start}`" if config.adapter.start else f"LoRA, rank {config.adapter.rank}"


def _hub_data(source: str | None) -> list[str] | None:
    """Return the hub id of a source of data, without its split; None for files and built-in sets."""
    name = (source or "").partition(":")[0]
    is_table = Path(name).suffix.lower() in {*TABLE_SUFFIXES, ".json", ".txt"}
    return [name] if name and not is_table and is_hub_id(name) else None


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"


def _evaluation_section(config: RunConfig, output: Path) -> list[str]:
    lines = [line for line in read_metrics(output) if any(key.startswith("evaluation/") for key in line)]
    if not lines:
        return []
    names = sorted({key for line in lines for key in line if key.startswith("evaluation/")})
    header = " | ".join(name.removeprefix("evaluation/") for name in names)
    rows = [
        f"| {line['step']} | " + " | ".join("" if line.get(n) is None else f"{line[n]:.4f}" for n in names) + " |"
        for line in lines
    ]
    return [
        "## Evaluation while training",
        "",
        f"{task_of(config).card.evaluation}, for monitoring the run; to compare models, use `mmalign compare`.",
        "",
        f"| step | {header} |",
        "|---|" + "---|" * len(names),
        *rows,
        "",
    ]
