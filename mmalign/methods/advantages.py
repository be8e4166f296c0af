"""What policy gradients on own samples share: advantages of a round, and the sampling steps that an update takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mmalign.core.distributed import gather, world_size
from mmalign.core.progress import note
from mmalign.methods.base import LossOutput
from mmalign.methods.group_rewards import GroupRewardConfig, reward_metrics
from mmalign.methods.rollout import Rollout
from mmalign.methods.run import Run

ENOUGH_GROUPS = 16


class AdvantageConfig(GroupRewardConfig):
    """Base of the configurations of methods that weigh the sampling steps of an image by its advantage."""

    advantage_clip: float = Field(5.0, gt=0)
    """advantages are clipped to +- this value"""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """share of the learned sampling steps that an update trains on, redrawn at every update for each image"""


def with_advantages(rollouts: list[Rollout], found: Sequence[Float[Tensor, " batch"]]) -> list[Rollout]:
    """Give the samples of each micro-batch their advantages."""
    for rollout, advantages in zip(rollouts, found, strict=True):
        rollout.advantages = advantages
    return rollouts


def drawn_steps(run: Run, batch: Rollout, fraction: float) -> Bool[Tensor, "steps batch"] | None:
    """Return which steps each image is trained on: as many for all, at least one, drawn by its id; None: all."""
    if fraction == 1:
        return None
    steps = torch.tensor(batch.learned_steps())
    count = max(1, round(fraction * len(steps)))
    drawn = torch.zeros(batch.old_log_probs.shape, dtype=torch.bool)
    for column, name in enumerate(batch.samples.ids):
        source = run.random("steps", run.step, name, batch.samples.epoch)
        drawn[steps[torch.randperm(len(steps), generator=source)[:count]], column] = True
    return drawn.to(batch.old_log_probs.device)


def mean_of_drawn(
    batch: Rollout, losses: Float[Tensor, "steps batch"], clipped: Bool[Tensor, "steps batch"]
) -> LossOutput:
    """Return the mean over images and the steps they are trained on, and the share of these that is clipped."""
    if batch.wanted is not None:
        drawn = batch.wanted[batch.learned_steps()]
        losses, clipped = losses[drawn], clipped[drawn]
    return LossOutput(losses.mean(), {"clipped": clipped.float().mean()})


def round_metrics(rollouts: Sequence[Rollout], size: int) -> dict[str, Tensor | float]:
    """Return the rewards of a round of this process, and the share of groups of `size` whose rewards are equal."""
    rewards = torch.cat([one.rewards for one in rollouts])
    parts = {name: torch.cat([one.parts[name] for one in rollouts]) for name in rollouts[0].parts}
    flat = ~torch.cat([_taught(one) for one in rollouts]).view(-1, size).any(1)
    return {**reward_metrics(rewards, parts), "flat": flat.float().mean()}


def warn_of_few_groups(rollouts: Sequence[Rollout], size: int) -> None:
    """Warn if a round has few groups of `size`, over all processes."""
    groups = sum(len(one.rewards) for one in rollouts) // size * world_size()
    if groups < ENOUGH_GROUPS:
        note(
            f"warning: a round of {groups} prompts; with fewer than {ENOUGH_GROUPS} rewards tend to oscillate: "
            "raise trainer.batch_size or trainer.gradient_accumulation"
        )


def without_zeros(rollouts: Sequence[Rollout], least: int) -> list[Rollout]:
    """Return the samples without those of advantage 0, as in groups of equal rewards: they teach nothing.

    At least so many samples are kept, such ones if need be.
    """
    chosen = [_taught(one).cpu() for one in rollouts]
    missing = least - sum(int(rows.sum()) for rows in chosen)
    for rows in chosen:
        spare = (~rows).nonzero().flatten()[: max(missing, 0)]
        rows[spare] = True
        missing -= len(spare)
    return [
        one if rows.all() else one.select(rows.nonzero().flatten().to(one.rewards.device), one.share, one.first_pass)
        for one, rows in zip(rollouts, chosen, strict=True)
    ]


def _taught(rollout: Rollout) -> Bool[Tensor, " batch"]:
    assert rollout.advantages is not None
    return rollout.advantages != 0


def weigh_samples_alike(steps: Sequence[Sequence[Rollout]], count: int) -> list[list[Rollout]]:
    """Set the shares of micro-batches of different sizes so that an optimiser step is the mean over its samples.

    That is the mean over samples whose advantage is not 0, of all processes; over all samples where there are none.
    `count` is the number of micro-batches whose mean the loop takes.
    """
    taught = [torch.cat([_taught(one) for one in step]) for step in steps]
    everyone = gather([(int(rows.sum()), len(rows)) for rows in taught])
    for number, step in enumerate(steps):
        learned, held = (sum(counts) for counts in zip(*(one[number] for one in everyone), strict=True))
        mean = (learned or held) / len(everyone)
        for one in step:
            one.share = count * len(one.rewards) / mean
    return [[one for one in step if len(one.rewards)] for step in steps]
