"""Under which names ComfyUI, Forge, A1111 and kohya's scripts look for the LoRA of a UNet's layers: facts, re-created.

ComfyUI: ``comfy/lora.py`` takes every weight of the original UNet under ``lora_unet_`` and its name with underscores,
and the same weights under diffusers' names, which ``comfy/utils.py`` counts from the blocks' numbers. Forge has the
same two maps. A1111: ``extensions-builtin/Lora/networks.py`` turns diffusers' names into the original ones by
arithmetic for two layers a block. kohya: ``networks/lora.py`` names the layers inside its target classes after its
own UNet, which has diffusers' names for Stable Diffusion 1 and 2 and the original ones for SDXL.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

INSIDE_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
INSIDE_BLOCK = [
    *(f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
]
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def comfy_layers(config: Any) -> dict[str, str]:
    """Return original name -> diffusers' name of every adaptable layer, counted as ComfyUI does."""
    levels, per_level = len(config.block_out_channels), config.layers_per_block
    depth = config.transformer_layers_per_block
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    down = [d if "CrossAttn" in kind else 0 for d, kind in zip(depths, config.down_block_types, strict=True)]
    up = [d if "CrossAttn" in kind else 0 for d, kind in zip(depths[::-1], config.up_block_types, strict=True)]
    found = {original: name for name, original in OUTSIDE.items()}

    def resnet(original: str, name: str) -> None:
        found.update({f"{original}.{inside}": f"{name}.{own}" for inside, own in INSIDE_RESNET.items()})

    def transformer(original: str, name: str, blocks: int) -> None:
        for inside in ("proj_in", "proj_out"):
            found[f"{original}.{inside}"] = f"{name}.{inside}"
        for block in range(blocks):
            for inside in INSIDE_BLOCK:
                own = f"transformer_blocks.{block}.{inside}"
                found[f"{original}.{own}"] = f"{name}.{own}"

    for level in range(levels):
        first = 1 + (per_level + 1) * level
        for index in range(per_level):
            resnet(f"input_blocks.{first + index}.0", f"down_blocks.{level}.resnets.{index}")
            if down[level]:
                transformer(f"input_blocks.{first + index}.1", f"down_blocks.{level}.attentions.{index}", down[level])
        found[f"input_blocks.{first + per_level}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    resnet("middle_block.0", "mid_block.resnets.0")
    transformer("middle_block.1", "mid_block.attentions.0", depths[-1])
    resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(levels):
        first = (per_level + 1) * level
        for index in range(per_level + 1):
            resnet(f"output_blocks.{first + index}.0", f"up_blocks.{level}.resnets.{index}")
            if up[level]:
                transformer(f"output_blocks.{first + index}.1", f"up_blocks.{level}.attentions.{index}", up[level])
        last = f"output_blocks.{first + per_level}.{2 if up[level] else 1}.conv"
        found[last] = f"up_blocks.{level}.upsamplers.0.conv"
    return found


def comfy_key_map(config: Any) -> dict[str, str]:
    """Return the names that ComfyUI and Forge accept -> diffusers' name of the layer."""
    layers = comfy_layers(config)
    original = {f"lora_unet_{name.replace('.', '_')}": own for name, own in layers.items()}
    return original | {f"lora_unet_{own.replace('.', '_')}": own for own in layers.values()}


def a1111_name(key: str) -> str:
    """Return the original name, with underscores, that A1111 makes of a name of diffusers (two layers a block)."""
    key = key.removeprefix("lora_unet_")
    inside = {"_conv1": "_in_layers_2", "_conv2": "_out_layers_3", "_time_emb_proj": "_emb_layers_1"}
    inside["_conv_shortcut"] = "_skip_connection"
    rules = [
        (r"conv_in(.*)", lambda m: "input_blocks_0_0"),
        (r"conv_out(.*)", lambda m: "out_2"),
        (r"time_embedding_linear_(\d+)", lambda m: f"time_embed_{2 * int(m[1]) - 2}"),
        (r"down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", lambda m: _a1111_block("input", 1, m)),
        (
            r"mid_block_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"middle_block_{1 if m[1][0] == 'a' else 2 * int(m[2])}_{m[3]}",
        ),
        (r"up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", lambda m: _a1111_block("output", 0, m)),
        (r"down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op"),
        (
            r"up_blocks_(\d+)_upsamplers_0_conv",
            lambda m: f"output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) else 1}_conv",
        ),
    ]
    for pattern, rule in rules:
        match = re.fullmatch(pattern, key)
        if match:
            name = rule(match)
            for own, original in inside.items():
                name = name.replace(own, original) if "resnets" in key else name
            return name
    return key


def _a1111_block(side: str, first: int, match: Any) -> str:
    place = first + 3 * int(match[1]) + int(match[3])
    return f"{side}_blocks_{place}_{1 if match[2] == 'attentions' else 0}_{match[4]}"


def kohya_keys(network: Any) -> set[str]:
    """Return the names of all layers that kohya's scripts can adapt, with convolutions (LoCon)."""
    found = set()
    original = {own: name for name, own in comfy_layers(network.config).items()}
    for name, module in network.named_modules():
        if type(module).__name__ in ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"):
            for inside, layer in module.named_modules():
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                    own = f"{name}.{inside}"
                    sdxl = network.config.addition_embed_type == "text_time"
                    found.add(f"lora_unet_{(original[own] if sdxl else own).replace('.', '_')}")
    return found


@torch.no_grad()
def apply_by_hand(network: Any, state: dict[str, Tensor], layer_of_key: dict[str, str]) -> int:
    """Add ``alpha / rank * up @ down`` of a kohya file to the weights, as those tools do; return how many layers."""
    done = 0
    for key in [key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")]:
        down, up, alpha = (state.pop(f"{key}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = network.get_submodule(layer_of_key[key]).weight
        change = up.flatten(1).double() @ down.flatten(1).double()
        weight += (alpha.item() / down.shape[0] * change).reshape(weight.shape).float()
        done += 1
    assert not state
    return done
