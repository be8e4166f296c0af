"""What the processes of a distributed run tell each other besides gradients; alone, a process talks to itself."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

ObjectT = TypeVar("ObjectT")


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return this process's number."""
    return torch.distributed.get_rank() if _several() else 0


def gather(mine: ObjectT) -> list[ObjectT]:
    """Return what every process passed, in the order of their numbers."""
    if not _several():
        return [mine]
    everyone: list[ObjectT] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def mean(mine: Tensor) -> Tensor:
    """Return the mean of what every process passed, element by element, without a gradient."""
    if not _several():
        return mine.detach()
    total = mine.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
