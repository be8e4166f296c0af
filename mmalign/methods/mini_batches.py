"""Cut a round of a method's own samples into mini-batches, one optimiser step each, in an order drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.core.distributed import gather, rank
from mmalign.core.errors import UserError


class Samples(Protocol):
    """Samples of one micro-batch with their rewards, of which some can be taken."""

    rewards: Tensor

    def select(self, rows: Int[Tensor, " rows"], share: float, first_pass: bool) -> Any:
        """Return some of the samples, by their numbers; `share` is the weight of their loss."""


SamplesT = TypeVar("SamplesT", bound=Samples)


def round_advantages(
    round_of: Sequence[tuple[Sequence[str], Tensor]], compute: Callable[[Sequence[str], Tensor], Tensor]
) -> list[Float[Tensor, " batch"]]:
    """Return the advantages of each micro-batch's samples, given prompts and rewards [B] or [B, K] of each.

    `compute` is given the prompts and rewards of the whole round, of all processes.
    """
    prompts = [prompt for theirs, _ in round_of for prompt in theirs]
    rewards = torch.cat([theirs for _, theirs in round_of])
    everywhere = gather((prompts, rewards.tolist()))
    all_prompts = [prompt for theirs, _ in everywhere for prompt in theirs]
    found = compute(all_prompts, rewards.new_tensor([reward for _, theirs in everywhere for reward in theirs]))
    mine = found[rank() * len(prompts) :][: len(prompts)]
    return list(mine.split([len(theirs) for _, theirs in round_of]))


def cut_round(
    held: Sequence[SamplesT], passes: int, parts: int, *, unit: int, source: Callable[[int], torch.Generator]
) -> list[list[SamplesT]]:
    """Pass over a round several times, each time shuffled and cut into mini-batches, one optimiser step each.

    `unit` samples in a row stay together; `source` gives the generator of the order of each pass.

    Raises:
        UserError: there are more mini-batches than units.
    """
    if parts == 1:
        return [list(held)] * passes
    owner, number = places([len(samples.rewards) // unit for samples in held])
    check_parts(len(owner), parts, "prompts" if unit > 1 else "images")
    steps = []
    for turn in range(passes):
        for part in shuffled_parts(len(owner), parts, source(turn)):
            step = []
            for index in owner[part].unique().tolist():
                units = number[part[owner[part] == index]].sort().values
                rows = (unit * units.unsqueeze(1) + torch.arange(unit)).flatten()
                step.append(held[index].select(rows, len(held) * len(units) / len(part), turn == 0))
            steps.append(step)
    return steps


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
