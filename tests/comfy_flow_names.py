"""Under which names ComfyUI looks for a flow transformer's LoRA, and into which rows it adds it: facts, re-created.

``comfy/lora.py`` (model_lora_keys_unet) takes diffusers' names under ``transformer.``. ComfyUI keeps the original
layout, in which q, k and v are rows of one matrix: ``comfy/utils.py`` says of which (mmdit_to_diffusers,
flux_to_diffusers for FLUX.1 and FLUX.2, z_image_to_diffusers). Its Qwen-Image has diffusers' layers.
"""

from __future__ import annotations

import itertools
from typing import Any

Rows = tuple[str, int, int | None]
"""A matrix of the original layout, the first row, and the number of rows (None: all)."""
FEED_FORWARD = {"ff.net.0.proj": "0", "ff.net.2": "2", "ff.linear_in": "0", "ff.linear_out": "2"}


def fused(layer: str, parts: tuple[str, ...], original: str, width: int) -> dict[str, Rows]:
    """Return where the parts of one fused matrix, each of `width` rows, lie."""
    return {f"{layer}.{part}": (original, width * place, width) for place, part in enumerate(parts)}


def sd3_names(layers: int, width: int) -> dict[str, Rows]:
    """Return the map of SD3, whose width ComfyUI takes for 64 a layer, as it is in SD3 and 3.5."""
    found: dict[str, Rows] = {}
    for index in range(layers):
        ours, theirs = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        for attention in ("attn", "attn2"):
            qkv = f"{theirs}.x_block.{attention}.qkv"
            found |= fused(f"{ours}.{attention}", ("to_q", "to_k", "to_v"), qkv, width)
        context = f"{theirs}.context_block"
        found |= fused(f"{ours}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), f"{context}.attn.qkv", width)
        found[f"{ours}.attn.to_out.0"] = (f"{theirs}.x_block.attn.proj", 0, None)
        found[f"{ours}.attn.to_add_out"] = (f"{context}.attn.proj", 0, None)
        for (name, side), (own, end) in itertools.product(
            (("ff", f"{theirs}.x_block"), ("ff_context", context)), (("net.0.proj", "fc1"), ("net.2", "fc2"))
        ):
            found[f"{ours}.{name}.{own}"] = (f"{side}.mlp.{end}", 0, None)
    return found


def flux_names(layers: int, single_layers: int, width: int) -> dict[str, Rows]:
    """Return the map of FLUX.1 and FLUX.2."""
    found: dict[str, Rows] = {}
    for index in range(layers):
        ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
        found |= fused(f"{ours}.attn", ("to_q", "to_k", "to_v"), f"{theirs}.img_attn.qkv", width)
        context = ("add_q_proj", "add_k_proj", "add_v_proj")
        found |= fused(f"{ours}.attn", context, f"{theirs}.txt_attn.qkv", width)
        found[f"{ours}.attn.to_out.0"] = (f"{theirs}.img_attn.proj", 0, None)
        found[f"{ours}.attn.to_add_out"] = (f"{theirs}.txt_attn.proj", 0, None)
        for own, end in FEED_FORWARD.items():
            found[f"{ours}.{own}"] = (f"{theirs}.img_mlp.{end}", 0, None)
            found[f"{ours}.{own.replace('ff.', 'ff_context.')}"] = (f"{theirs}.txt_mlp.{end}", 0, None)
    for index in range(single_layers):
        ours, theirs = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        found |= fused(f"{ours}.attn", ("to_q", "to_k", "to_v"), f"{theirs}.linear1", width)
        found[f"{ours}.proj_mlp"] = (f"{theirs}.linear1", 3 * width, 4 * width)
        found[f"{ours}.proj_out"] = (f"{theirs}.linear2", 0, None)
        found[f"{ours}.attn.to_qkv_mlp_proj"] = (f"{theirs}.linear1", 0, None)
        found[f"{ours}.attn.to_out"] = (f"{theirs}.linear2", 0, None)
    return found


def z_image_names(layers: int, refiners: int, width: int) -> dict[str, Rows]:
    """Return the map of Z-Image."""
    blocks = [f"layers.{index}" for index in range(layers)]
    blocks += [f"{side}_refiner.{index}" for side in ("context", "noise") for index in range(refiners)]
    found: dict[str, Rows] = {}
    for block in blocks:
        found |= fused(f"{block}.attention", ("to_q", "to_k", "to_v"), f"{block}.attention.qkv", width)
        found[f"{block}.attention.to_out.0"] = (f"{block}.attention.out", 0, None)
        found |= {f"{block}.feed_forward.w{n}": (f"{block}.feed_forward.w{n}", 0, None) for n in (1, 2, 3)}
    return found


def comfy_flow_map(network: Any) -> dict[str, Rows]:
    """Return the names that ComfyUI looks for, without the ends of the two matrices -> what it adds them to."""
    config, kind = network.config, type(network).__name__
    if kind == "SD3Transformer2DModel":
        found = sd3_names(config.num_layers, config.num_attention_heads * config.attention_head_dim)
    elif kind in ("FluxTransformer2DModel", "Flux2Transformer2DModel"):
        width = config.num_attention_heads * config.attention_head_dim
        found = flux_names(config.num_layers, config.num_single_layers, width)
    elif kind == "ZImageTransformer2DModel":
        found = z_image_names(config.n_layers, config.n_refiner_layers, config.dim)
    else:
        assert kind == "QwenImageTransformer2DModel"
        weights = [name.removesuffix(".weight") for name in network.state_dict() if name.endswith(".weight")]
        found = {name: (name, 0, None) for name in weights}
    return {f"transformer.{name}": rows for name, rows in found.items()}
