"""Cut a round of a method's own samples into mini-batches, one optimiser step each, in an order drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mmalign.core.errors import UserError


def shuffled_parts(count: int, parts: int, source: torch.Generator) -> list[Int[Tensor, " part"]]:
    """Return the numbers 0 to count - 1 in random order as so many parts, whose sizes differ by one at most."""
    return list(torch.randperm(count, generator=source).tensor_split(parts))


def places(sizes: Sequence[int]) -> tuple[Int[Tensor, " items"], Int[Tensor, " items"]]:
    """Return for each item of several groups, counted through, which group it is in and its number there."""
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
    number = torch.cat([torch.arange(size) for size in sizes]) if sizes else torch.zeros(0, dtype=torch.long)
    return owner, number


def check_parts(items: int, parts: int, what: str) -> None:
    """Refuse more mini-batches than there are items to put into them.

    Raises:
        UserError: names both numbers.
    """
    if items < parts:
        raise UserError(
            f"method.mini_batches {parts}: a round has {items} {what} on each process; lower it, or raise "
            "trainer.batch_size or trainer.gradient_accumulation"
        )
