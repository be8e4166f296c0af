"""Names of a UNet's layers: diffusers', and those of the original (LDM) code that ComfyUI, Forge and kohya use.

The original code numbers the blocks of a UNet in one row, ``input_blocks.N``, ``middle_block.N``, ``output_blocks.N``;
diffusers groups them by resolution. Layout: CompVis/stable-diffusion, ``ldm/modules/diffusionmodules/openaimodel.py``.
"""

from __future__ import annotations

from typing import Any

import torch

KOHYA_PREFIX = "lora_unet_"
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def lora_prefix(network: Any) -> str:
    """Return how diffusers' names of a network's LoRA begin: "unet." or "transformer."."""
    return "unet." if hasattr(network, "down_blocks") else "transformer."


def adaptable_layers(network: Any) -> dict[str, torch.nn.Module]:
    """Return the linear and convolution layers of a network by name, whether they carry an adapter or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, torch.nn.Module] = {}
    adapted: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{name}.")
            found[name] = module.get_base_layer()
        elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not (
            adapted and name.startswith(tuple(adapted[-1:]))
        ):
            found[name] = module
    return found


def ldm_names(network: Any) -> dict[str, str]:
    """Return the original name of every layer of a UNet that has one, by its name in diffusers.

    >>> from diffusers import UNet2DConditionModel
    >>> ldm_names(UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
    ...     up_block_types=("UpBlock2D",) * 2))["down_blocks.1.resnets.0.conv1"]
    'input_blocks.4.0.in_layers.2'
    """
    if not all(hasattr(network, part) for part in ("down_blocks", "mid_block", "up_blocks")):
        return {}
    blocks = _OUTSIDE | _blocks(network)
    names = {}
    for name in adaptable_layers(network):
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            block = blocks.get(".".join(parts[:cut]))
            if block is not None:
                rest = ".".join(parts[cut:])
                inside = _RESNET.get(rest, rest) if "resnets" in parts[:cut] else rest
                names[name] = f"{block}.{inside}" if inside else block
                break
    return names


def _blocks(network: Any) -> dict[str, str]:
    """Return where diffusers' parts of the UNet lie in the original numbering."""
    found: dict[str, str] = {}
    place = 0
    for level, block in enumerate(network.down_blocks):
        for index in range(len(block.resnets)):
            place += 1
            found[f"down_blocks.{level}.resnets.{index}"] = f"input_blocks.{place}.0"
            found[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{place}.1"
        if getattr(block, "downsamplers", None):
            place += 1
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
    for index in range(2):
        found[f"mid_block.resnets.{index}"] = f"middle_block.{2 * index}"
    found["mid_block.attentions.0"] = "middle_block.1"
    place = -1
    for level, block in enumerate(network.up_blocks):
        for index in range(len(block.resnets)):
            place += 1
            found[f"up_blocks.{level}.resnets.{index}"] = f"output_blocks.{place}.0"
            found[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{place}.1"
        if getattr(block, "upsamplers", None):
            after = 2 if getattr(block, "attentions", None) else 1
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place}.{after}.conv"
    return found


def kohya_names(network: Any) -> dict[str, str]:
    """Return the name of every layer of a UNet in kohya's files, by its name in diffusers.

    kohya's scripts train Stable Diffusion 1 and 2 under diffusers' names and SDXL under the original ones; ComfyUI,
    Forge and A1111 read both.
    """
    config = getattr(network, "config", None)
    original = ldm_names(network)
    if getattr(config, "addition_embed_type", None) != "text_time":
        original = {name: name for name in original}
    return {name: KOHYA_PREFIX + given.replace(".", "_") for name, given in original.items()}


def layer_of_name(network: Any) -> dict[str, str]:
    """Return the layer for each of the names under which tools store its LoRA."""
    found: dict[str, str] = {}
    original = ldm_names(network)
    for name in adaptable_layers(network):
        found[name] = name
        for prefix in (KOHYA_PREFIX, "lycoris_"):
            found[prefix + name.replace(".", "_")] = name
        if name in original:
            found[KOHYA_PREFIX + original[name].replace(".", "_")] = name
            found[f"diffusion_model.{original[name]}"] = name
    return found
