"""The model card of a finished run: what it was made from, by which method, with what result, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mmalign import __version__
from mmalign.config.run import RunConfig, dump_config
from mmalign.core.files import write_atomically
from mmalign.core.io.tables import TABLE_SUFFIXES
from mmalign.core.resources import is_hub_id
from mmalign.training.models import answers
from mmalign.training.output import CARD_FILE
from mmalign.training.tracking import read_metrics

_LOOKS = {False: "Means over a few fixed prompts and seeds", True: "Shares of right answers to a few fixed questions"}


_ALL_WEIGHTS = {False: "all weights of the denoiser", True: "all weights"}


def write_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> None:
    """Write the model card README.md beside the weights."""
    write_atomically(output / CARD_FILE, model_card(config, output, facts))


def model_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> str:
    """Return the model card: the Hub's metadata, then base, data, method, numbers, seeds and how to load it.

    `facts` are further rows of the table of facts, name -> value. The metadata names base model and data only where
    they are the Hub's: a path would be no valid id there; the table of facts names them as they were given.
    """
    method, lora = config.method_name, config.adapter.kind == "lora"
    library, task = ("transformers", "image-text-to-text") if answers(config) else ("diffusers", "text-to-image")
    data = config.data.pairs or config.data.labels or config.data.prompts
    metadata = ModelCardData(
        base_model=config.model.partition("@")[0] if is_hub_id(config.model) else None,
        datasets=_hub_data(data),
        library_name=library,
        pipeline_tag=task,
        license="other",
        license_name="as-base-model",
        tags=["mmalign", method, task, *(["lora"] if lora else [])],
    )
    rows = {
        "base model": f"`{config.model}`",
        "method": f"`{method}`, {_options(config.method_options)}",
        "data": f"`{data}`",
        "trained": f"LoRA, rank {config.adapter.rank}" if lora else _ALL_WEIGHTS[answers(config)],
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
            *_usage(config, output),
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


def _hub_data(source: str | None) -> list[str] | None:
    """Return the hub id of a source of data, without its split; None for files and built-in sets."""
    name = (source or "").partition(":")[0]
    is_table = Path(name).suffix.lower() in {*TABLE_SUFFIXES, ".json", ".txt"}
    return [name] if name and not is_table and is_hub_id(name) else None


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"


def _usage(config: RunConfig, output: Path) -> list[str]:
    source, adapter = (config.model, True) if config.adapter.kind == "lora" else (str(output), False)
    if answers(config):
        return _transformers_usage(source, str(output) if adapter else None)
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{source}")',
    ]
    if adapter:
        lines.append(f'pipe.load_lora_weights("{output}")')
    return [*lines, 'image = pipe("a prompt").images[0]']


def _transformers_usage(source: str, adapter: str | None) -> list[str]:
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'processor = AutoProcessor.from_pretrained("{source}")',
        f'model = AutoModelForImageTextToText.from_pretrained("{source}")',
    ]
    if adapter is not None:
        lines.append(f'model.load_adapter("{adapter}")')
    turn = (
        '{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What moves?"}]}'
    )
    return [
        *lines,
        f"turns = [{turn}]",
        'options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")',
        "answer = model.generate(**processor.apply_chat_template(turns, **options), max_new_tokens=64)",
        "print(processor.batch_decode(answer, skip_special_tokens=True)[0])",
    ]


def _evaluation_section(config: RunConfig, output: Path) -> list[str]:
    looks = [line for line in read_metrics(output) if any(key.startswith("evaluation/") for key in line)]
    if not looks:
        return []
    names = sorted({key for line in looks for key in line if key.startswith("evaluation/")})
    header = " | ".join(name.removeprefix("evaluation/") for name in names)
    rows = [
        f"| {line['step']} | " + " | ".join("" if line.get(n) is None else f"{line[n]:.4f}" for n in names) + " |"
        for line in looks
    ]
    return [
        "## Evaluation while training",
        "",
        f"{_LOOKS[answers(config)]}: a look at the run, not a comparison (for that, `mmalign compare`).",
        "",
        f"| step | {header} |",
        "|---|" + "---|" * len(names),
        *rows,
        "",
    ]
