"""Precision of a run: trained weights in float32, and matrix products in float32, bfloat16 or float16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from mmalign.core.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

# Layers whose weights autocast rounds to the compute precision at every call. Normalisation layers are left out:
# autocast computes them in float32, where rounded weights would change the result.
_AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_precision(precision: Precision, device: torch.device | None = None, key: str = "trainer.precision") -> None:
    """Refuse a precision that the device does not support; `key` is the key that the user set.

    device: None is the GPU where there is one, else the CPU.

    Raises:
        UserError: fp16 on a CPU, or bf16 on a GPU without it.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}: fp16 needs a GPU and this run uses the CPU; use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{key}: {torch.cuda.get_device_name(device)} does not support bf16; use fp16 or fp32")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context in which the network is called."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def round_frozen(network: nn.Module, precision: Precision) -> None:
    """Store the frozen layers in the compute precision, in place; this halves their memory and saves casts.

    This changes no result under `autocast`, which rounds the same weights to the same values. A weight that another
    kind of layer holds too, such as the embedding of a tied output head, stays as it is: autocast leaves it there.
    """
    # transformers takes the dtype of a whole network from its first weights, and SmolVLM casts features to it.
    kept = {id(next(network.parameters()))} if hasattr(network, "get_input_embeddings") else set()
    for layer in network.modules():
        if not isinstance(layer, _AUTOCAST_LAYERS):
            kept |= {id(weight) for weight in layer.parameters(recurse=False)}
    for layer in network.modules():
        if isinstance(layer, _AUTOCAST_LAYERS) and not any(
            p.requires_grad or id(p) in kept for p in layer.parameters()
        ):
            layer.to(DTYPES[precision])
