"""The optimiser, its learning rate as a pure function of the step, and the averaging of gradients over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine"]


def warmup_steps(warmup: float, steps: int) -> int:
    """Return the length of the warm-up: a value below 1 is a fraction of the run, anything else a number of steps."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """Return the factor of the learning rate at update `step` (0-based) of `steps`, in [0, 1].

    Linear warm-up reaches 1 at its last step and never starts at 0 (the first update would be wasted). After it,
    "constant" stays, "linear" and "cosine" fall, reaching 0 one step after the last update.
    """
    warm = warmup_steps(warmup, steps)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    done = (step - warm) / max(steps - warm, 1)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """Return AdamW with the fused kernel, which on small models is several times faster than the plain loop."""
    return torch.optim.AdamW(
        list(parameters), lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=1e-8, fused=True
    )


def average_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Average gradients over all ranks, in place, in one message.

    Used instead of wrapping the network in DistributedDataParallel: a method may call the network any number of times
    per loss, with the adapter on or off, with or without a graph, and none of that has to be declared. A parameter
    without a gradient counts as zero, so that every rank sends the same message; and alone, if none has one, as in a
    step whose mini-batch is empty, which is then the same step as on several ranks.
    """
    if world_size == 1:
        if all(parameter.grad is None for parameter in parameters):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world_size)
    torch.distributed.all_reduce(flat)
    for parameter, mean in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = mean.view_as(parameter)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the state of an optimiser over parameters of these names as flat tensors, "name::exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}::{key}": value
        for index, name in enumerate(names)
        for key, value in state.get(index, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Put a state written by `optimizer_tensors` into an optimiser over the same parameters."""
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for flat_name, value in tensors.items():
        name, _, key = flat_name.rpartition("::")
        state.setdefault(index_of[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
