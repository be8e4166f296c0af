"""LoRA on a vision-language model in peft's own layout: save, load, merge; the rest is `pipelines.adapters`.

A directory holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``mmalign.json``, which names the base;
``peft.PeftModel.from_pretrained(model, directory)`` reads it as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pipelines.adapters import ADAPTER, RECORD_NAME, attach, has_adapter, lora_layers, lora_parameters
from pipelines.errors import MissingModelError, PipelineError, nearest
from pipelines.saving import replacing_parts

CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The default targets: every linear layer of the language model's blocks."""
_PREFIX = "base_model.model."


def layers_to_adapt(network: Any, inside: str, targets: Iterable[str] | None) -> list[str]:
    """Return the full names of the linear layers under `inside` that end in one of `targets` (default `TARGETS`).

    Raises:
        PipelineError: a target is the end of no such layer.
    """
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(f"{inside}.")
    ]
    chosen: set[str] = set()
    for target in targets or TARGETS:
        found = {name for name in names if f".{name}".endswith(f".{target}")}
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise PipelineError(
                f"no layer of the language model matches the adapter target '{target}'; it has {', '.join(leaves)}."
                f"{nearest(target, leaves)}"
            )
        chosen |= found
    return sorted(chosen)


def is_vlm_adapter(path: str | Path) -> bool:
    """Say whether a directory holds an adapter in peft's layout and no whole model."""
    return (Path(path) / CONFIG_NAME).is_file() and not (Path(path) / "config.json").is_file()


def save_adapter(network: Any, path: str | Path, record: dict[str, Any]) -> None:
    """Write the adapter and `record` into the directory `path`; the same weights make the same bytes.

    Raises:
        PipelineError: the network carries no adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not has_adapter(network):
        raise PipelineError("there is no adapter to save; the model was not trained with adapter: {kind: lora}.")
    config = {name: value for name, value in network.peft_config[ADAPTER].to_dict().items() if value is not None}
    # peft keeps the targets in a set; sorted, the same adapter makes the same file.
    config |= {"target_modules": sorted(config["target_modules"]), "inference_mode": True}
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    with replacing_parts(Path(path), RECORD_NAME) as scratch:
        save_file(
            {_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()},
            scratch / PEFT_WEIGHTS,
            metadata={"format": "pt"},
        )
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        (scratch / RECORD_NAME).write_text(json.dumps({**record, "rank": config["r"]}, indent=2) + "\n")


def load_adapter(network: Any, path: str | Path) -> None:
    """Load an adapter directory in peft's layout, its weights trainable in float32 and everything else frozen.

    Raises:
        PipelineError: there is none, it does not fit this network, or the network already carries one.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(path)
    if has_adapter(network):
        raise PipelineError(f"cannot load the adapter {path}: the model already carries one.")
    for name in (CONFIG_NAME, PEFT_WEIGHTS):
        if not (path / name).is_file():
            raise MissingModelError(f"no adapter at {path}: {name} is missing; give a directory that peft wrote.")
    state = {name.removeprefix(_PREFIX): value for name, value in load_file(path / PEFT_WEIGHTS).items()}
    try:
        attach(network, LoraConfig.from_pretrained(str(path)))
        outcome: Any = set_peft_model_state_dict(network, state, adapter_name=ADAPTER)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(f"the adapter {path} does not fit this base model: {reason}") from error
    taken = len(lora_parameters(network))
    if outcome.unexpected_keys or taken != len(state):
        raise PipelineError(f"{path} holds {len(state)} tensors but {taken} fit this base model.")
    network.requires_grad_(False)
    for _, parameter in lora_parameters(network):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def merge_adapter(network: Any) -> None:
    """Fold the adapter into the weights that it adapts and remove it, in place; the network stays frozen."""
    for layer in lora_layers(network):
        layer.merge(safe_merge=True)
    for name, module in list(network.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    del network.peft_config
    network._hf_peft_config_loaded = False
