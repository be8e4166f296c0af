"""The model card of a finished run: what it was made from, by which method, with what result, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign import __version__
from mmalign.config.run import RunConfig, dump_config
from mmalign.core.files import write_atomically
from mmalign.training.models import answers
from mmalign.training.output import CARD_FILE
from mmalign.training.tracking import read_metrics

_LOOKS = {False: "Means over a few fixed prompts and seeds", True: "Shares of right answers to a few fixed questions"}


_ALL_WEIGHTS = {False: "all weights of the denoiser", True: "all weights"}


def write_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> None:
    """Write the model card README.md beside the weights."""
    write_atomically(output / CARD_FILE, model_card(config, output, facts))


def model_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> str:
    """Return the model card: Hugging Face front matter, then base, data, method, numbers, seeds and how to load it.

    `facts` are further rows of the table of facts, name -> value.
    """
    method, lora = config.method_name, config.adapter.kind == "lora"
    library, task = ("transformers", "image-text-to-text") if answers(config) else ("diffusers", "text-to-image")
    tags = ["mmalign", method, task, *(["lora"] if lora else [])]
    front = {
        "base_model": config.model,
        "library_name": library,
        "pipeline_tag": task,
        "license": "other",
        "license_name": "as-base-model",
        "tags": tags,
    }
    rows = {
        "base model": f"`{config.model}`",
        "method": f"`{method}`, {_options(config.method_options)}",
        "data": f"`{config.data.pairs or config.data.labels or config.data.prompts}`",
        "trained": f"LoRA, rank {config.adapter.rank}" if lora else _ALL_WEIGHTS[answers(config)],
        "exported weights": f"moving average ({config.trainer.ema:g})" if config.trainer.ema else "last step",
        "seed": config.trainer.seed,
        **facts,
        "licence": "that of the base model, as far as it and the data allow; state it here before publishing",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
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
