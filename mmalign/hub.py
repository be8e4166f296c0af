"""What a finished run leaves behind: weights that plain diffusers loads, the config, a model card, and proof of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mmalign import __version__
from mmalign.config.run import dump_config
from mmalign.core.files import write_atomically
from mmalign.models import EXPORTS, answers
from mmalign.tracking import read_metrics
from pipelines.conditioning import Conditioning
from pipelines.vlm_batch import VlmSample

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig

CONFIG_FILE, CARD_FILE = "config.yaml", "README.md"
_LOOKS = {False: "Means over a few fixed prompts and seeds", True: "Shares of right answers to a few fixed questions"}
_ALL_WEIGHTS = {False: "all weights of the denoiser", True: "all weights"}


class ExportError(RuntimeError):
    """The exported weights, read again, do not give what the trained model gave."""


@dataclass
class Probe:
    """One input of the network, by which an exported model is compared with the trained one."""

    x_t: Float[Tensor, "1 *latent"]
    t: Shaped[Tensor, " 1"]
    cond: Conditioning

    @torch.no_grad()
    def predict(self, generator: Any) -> Float[Tensor, "1 *latent"]:
        """Return the network's output in float32 arithmetic, dropout off, on the CPU."""
        training = generator.network.training
        generator.network.eval()
        output = generator.predict(self.x_t, self.t, self.cond).float().cpu()
        generator.network.train(training)
        return output


@dataclass
class VlmProbe:
    """One sample of a vision-language model, for the same purpose."""

    sample: VlmSample

    @torch.no_grad()
    def predict(self, model: Any) -> Float[Tensor, "1 tokens vocabulary"]:
        """Return the logits of every token of the answer, on the CPU."""
        logits: Tensor = model.completion_logits(model.collate([self.sample])).float().cpu()
        return logits


def export(generator: Any, config: RunConfig, output: Path, base_model: str) -> None:
    """Write the weights as they are now: an adapter for LoRA, else a diffusers or transformers directory."""
    output.mkdir(parents=True, exist_ok=True)
    if config.adapter.kind == "lora":
        generator.save_lora(output, base_model=base_model)
    else:
        generator.save(output)


def write_config(config: RunConfig, output: Path) -> None:
    """Write the resolved configuration, from which the run can be repeated."""
    write_atomically(output / CONFIG_FILE, dump_config(config))


def write_card(config: RunConfig, output: Path, facts: dict[str, Any]) -> None:
    """Write the model card README.md beside the weights."""
    write_atomically(output / CARD_FILE, model_card(config, output, facts))


def has_export(output: Path) -> bool:
    """Tell whether a folder holds exported weights, whatever they were trained by."""
    return any((output / name).is_file() for name in EXPORTS.values())


def is_finished(output: Path) -> bool:
    """Tell whether a run's weights are those of the configuration beside them.

    The configuration is written when a run starts and the card, which quotes it, after the weights: as long as a run
    goes on that began in the folder of an earlier one, the two disagree.
    """
    config, card = output / CONFIG_FILE, output / CARD_FILE
    if not (config.is_file() and card.is_file() and has_export(output)):
        return False
    return config.read_text(encoding="utf-8").rstrip() in card.read_text(encoding="utf-8")


def check_load_back(
    output: Path,
    load: Callable[[str], Any],
    probe: Probe | VlmProbe,
    expected: Tensor,
    tolerance: float = 1e-4,
) -> None:
    """Load the export as any user would and compare one prediction with that of the trained model.

    Raises:
        ExportError: they differ by more than the tolerance times the largest value (at least 1).
    """
    found = probe.predict(load(str(output)))
    difference = (found - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ExportError(
            f"{output} was written, but read again it predicts something else (largest difference {difference:.2g}, "
            f"allowed {allowed:.2g}); the last checkpoint in {output / 'checkpoints'} is sound, please report this"
        )


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
