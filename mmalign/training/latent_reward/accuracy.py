"""Accuracy of a latent reward at each noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmalign.core.progress import track
from mmalign.data.batches import ComparisonBatch
from mmalign.losses import latent_reward
from mmalign.training.latent_reward.comparisons import Comparisons

Scores = Callable[[ComparisonBatch, Tensor, str], tuple[Tensor, Tensor]]


class LevelAccuracy(NamedTuple):
    """Share of pairs ranked correctly at a level, ties left out; its standard error; the mean loss; the mean gap."""

    level: int
    accuracy: float
    error: float
    loss: float
    gap: float


def measure(
    pairs: Comparisons, grid: list[int], scores: Scores, batch_size: int, seed: int, device: Any
) -> list[LevelAccuracy]:
    """Score every pair at every level of `grid`; the noise depends on seed, pair and level alone.

    `gap` is the mean absolute difference of the two scores, a logit.
    """
    found = []
    clear = [index for index, preference in enumerate(pairs.preference.tolist()) if preference != 0.5]
    with track(len(grid) * len(clear), "measure", unit="pairs") as job:
        for level in grid:
            gaps = []
            for start in range(0, len(clear), batch_size):
                batch = pairs.batch(clear[start : start + batch_size], 0, seed).to(device)
                chosen, rejected = scores(batch, torch.full((len(batch),), level, device=device), f"level {level}")
                gaps.append((chosen - rejected).cpu())
                job.advance(len(batch))
            gap = torch.cat(gaps).double()
            # Equal scores count one half, so a constant model has accuracy one half.
            right = float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
            loss = latent_reward(gap, torch.zeros_like(gap), torch.ones_like(gap))
            error = math.sqrt(right * (1 - right) / len(gap))
            found.append(LevelAccuracy(level, right, error, float(loss.mean()), float(gap.abs().mean())))
    return found


def table_of(accuracies: list[LevelAccuracy]) -> str:
    """Write the accuracies as a table."""
    lines = ["level  accuracy          loss    mean |gap|"]
    for one in accuracies:
        lines.append(f"{one.level:>5}  {one.accuracy:.3f} +- {one.error:.3f}  {one.loss:>6.3f}  {one.gap:>8.3f}")
    mean = math.fsum(one.accuracy for one in accuracies) / len(accuracies)
    return "\n".join([*lines, f"{'all':>5}  {mean:.3f}"])
