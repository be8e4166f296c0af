"""Pairs of candidates of single sampling steps, and how a round of them becomes mini-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.core.distributed import gather
from mmalign.data.batches import PromptBatch
from mmalign.methods.mini_batches import places, shuffled_parts
from mmalign.methods.run import Run
from pipelines.branching import Branching
from pipelines.conditioning import Conditioning


@dataclass
class StepPairs:
    """One sampling step of every chain of a micro-batch, with its best and its worst candidate."""

    samples: PromptBatch
    step: Branching
    valid: Bool[Tensor, " batch"]
    """Which chains have a best and a worst that differ enough."""
    share: float
    """One over the number of steps of the micro-batch: its steps add up to a mean."""
    rewards: Float[Tensor, " batch"]
    """Those of the finished images, which nothing is learned from."""
    valid_share: float | None = None
    """Share of valid pairs in the whole round, where the others were dropped."""


def gather_rows(
    held: Sequence[StepPairs], owner: Int[Tensor, " rows"], row: Int[Tensor, " rows"], share: float, valid: float
) -> StepPairs:
    """Return single chains of several steps as one batch: chain `row` of step `owner`, for each."""
    chosen = [(held[number], position) for number, position in zip(owner.tolist(), row.tolist(), strict=True)]
    first, device = chosen[0][0], chosen[0][0].step.states.device
    starts, item = max(len(pairs.step.states) for pairs, _ in chosen), first.step.states.shape[1:]
    t, t_next = (torch.tensor([getattr(pairs.step, name) for pairs, _ in chosen]) for name in ("t", "t_next"))
    std = torch.tensor([pairs.step.std for pairs, _ in chosen], dtype=first.step.states.dtype)
    step = replace(
        first.step,
        t=t.to(device),
        t_next=t_next.to(device),
        std=std.to(device),
        states=torch.stack([pairs.step.states.expand(starts, *item)[:, at] for pairs, at in chosen], dim=1),
        candidates=torch.stack([pairs.step.candidates[:, at] for pairs, at in chosen], dim=1),
        clean=None,
    )
    samples = PromptBatch(
        [pairs.samples.prompts[at] for pairs, at in chosen],
        Conditioning.cat([pairs.samples.cond[at : at + 1] for pairs, at in chosen]),
        [pairs.samples.ids[at] for pairs, at in chosen],
        first.samples.epoch,
    )
    kept = (torch.stack([getattr(pairs, name)[at] for pairs, at in chosen]) for name in ("valid", "rewards"))
    return StepPairs(samples, step, next(kept), share, next(kept), valid)


def split_pairs(
    held: list[StepPairs], run: Run, *, passes: int, parts: int, size: int | None
) -> list[list[StepPairs]]:
    """Drop the pairs below the threshold, shuffle the others, and cut them into mini-batches; pairs of all steps mix.

    Each pass has `parts` mini-batches or, if `size` is given, as many as pairs of that number fill on the process that
    has most of them; one with fewer pairs gets smaller ones. A single part without a size is the round as it is.
    """
    if parts == 1 and size is None:
        return [held] * passes
    rows = [pairs.valid.nonzero().flatten().cpu() for pairs in held]
    owner, row = places([len(some) for some in rows])[0], torch.cat(rows)
    count = parts if size is None else max(1, *gather(math.ceil(len(row) / size)))
    micro_batches = sum(pairs.share for pairs in held)  # which the gradient of a step is divided by
    valid = len(row) / sum(len(pairs.valid) for pairs in held)
    at_once = max(len(pairs.valid) for pairs in held)
    return [
        [
            gather_rows(held, owner[few], row[few], micro_batches * len(few) / len(part), valid)
            for few in part.split(at_once)
            if len(few)
        ]
        for turn in range(passes)
        for part in shuffled_parts(len(row), count, run.random("mini-batches", run.step, turn))
    ]
