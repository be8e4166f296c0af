"""Communication between the processes of a distributed run besides gradients; also works with one process."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

ObjectT = TypeVar("ObjectT")


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return the rank of this process."""
    return torch.distributed.get_rank() if _several() else 0


def gather(mine: ObjectT) -> list[ObjectT]:
    """Return the values of all processes, in the order of their ranks."""
    if not _several():
        return [mine]
    everyone: list[ObjectT] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def mean(mine: Tensor) -> Tensor:
    """Return the elementwise mean of the tensors of all processes, without a gradient."""
    if not _several():
        return mine.detach()
    total = mine.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def is_main() -> bool:
    """Tell whether this process is the one that writes, evaluates and exports."""
    return rank() == 0


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if _several() else 1


def broadcast(value: ObjectT) -> ObjectT:
    """Return what the main process passed, on every process."""
    if not _several():
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]


def wait_for_everyone() -> None:
    """Return once every process has come this far."""
    if _several():
        torch.distributed.barrier()
