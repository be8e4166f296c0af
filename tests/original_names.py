"""Weights of tiny models under the names of the original code: what single-file checkpoints hold."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL
from lora_tools import OUTSIDE, comfy_layers
from torch import Tensor

NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}


def original_unet(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of a UNet under the names of the original code."""
    names = {own: name for name, own in comfy_layers(network.config).items()} | {"conv_norm_out": "out.0", **OUTSIDE}
    stems = {
        own.rsplit(".conv1", 1)[0]: name.rsplit(".in_layers", 1)[0] for own, name in names.items() if ".conv1" in own
    }
    stems |= {
        own.removesuffix(".proj_in"): name.removesuffix(".proj_in") for own, name in names.items() if "proj_in" in own
    }
    state = {}
    for key, value in network.state_dict().items():
        layer, end = key.rsplit(".", 1)
        if layer not in names:  # a norm, inside a resnet or a transformer
            stem = next(stem for stem in stems if layer.startswith(f"{stem}."))
            rest = layer.removeprefix(f"{stem}.")
            names[layer] = f"{stems[stem]}.{NORMS.get(rest, rest) if 'resnets' in stem else rest}"
        state[f"model.diffusion_model.{names[layer]}.{end}"] = value
    return state


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return the weights of an autoencoder under the names of the original code."""
    levels = len(vae.config.block_out_channels)
    rules = [
        (r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
        (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    state = {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        wide = ".attn_1." in name and name.endswith("weight") and "norm" not in name
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if wide else value
    return state


NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
IN_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def swapped(value: Tensor) -> Tensor:
    """Return scale and shift in the order of the original code."""
    return torch.cat(value.chunk(2)[::-1])


def original_sd3(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of SD3's transformer under the names of Stability AI's code."""
    own, state = network.state_dict(), {}
    last = f"transformer_blocks.{len(network.transformer_blocks) - 1}.norm1_context"
    for key, value in own.items():
        layer, end = key.rsplit(".", 1)
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", layer)
        name = IN_BLOCK.get(block[2]) if block else NAMES.get(layer)
        if name is not None:
            name = f"joint_blocks.{block[1]}.{name}" if block else name
            state[f"{name}.{end}"] = swapped(value) if layer.startswith(("norm_out", last)) else value
    for index in range(len(network.transformer_blocks)):
        for place, parts in FUSED.items():
            for end in ("weight", "bias"):
                found = [own.get(f"transformer_blocks.{index}.{part}.{end}") for part in parts]
                if found[0] is not None:
                    state[f"joint_blocks.{index}.{place}.qkv.{end}"] = torch.cat(found)
    state["pos_embed"] = own["pos_embed.pos_embed"]
    return {f"model.diffusion_model.{name}": value for name, value in state.items()}
