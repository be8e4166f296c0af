"""What the advantages in a group of images are taken of: one sum of rewards, each reward by itself, or comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.data.batches import PromptBatch
from mmalign.losses.advantages import Spread, each_group_advantages, favour_novelty, group_advantages
from mmalign.methods.base import MethodConfig
from mmalign.methods.mini_batches import round_advantages
from mmalign.methods.run import Run
from mmalign.scoring.live import Scores


class GroupRewardConfig(MethodConfig):
    """Base of the configurations of methods that compare the images of a prompt by several rewards."""

    advantage_of: Literal["total", "each", "win_rate"] = "total"
    """total: the weighted sum of the rewards; each: every reward by itself, summed after it is in units of its group's
    spread (GDPO); win_rate: the share of the comparisons in its group that an image wins (Pref-GRPO)"""
    tie_margin: float | None = Field(None, ge=0, allow_inf_nan=False)
    """for win_rate: a difference of scores up to this is a tie; 0 for a judge of pairs"""
    advantage_std: Literal["group", "batch", "none"] = "group"
    """an advantage is in units of the spread of: group, the rewards its mean is of; batch, the round's; none: of 1"""
    advantage_epsilon: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """added to the spread"""
    advantage_diversity: str | None = None
    """one of `rewards` that embeds images, with weight 0 for this alone; advantages above 0 are multiplied by the
    distance to the nearest other image of the group, over the mean of these (GARDO); null: not"""
    advantage_floor: float = Field(1e-5, ge=0, allow_inf_nan=False)
    """least spread, in units of the largest absolute reward: smaller differences are rounding"""

    @model_validator(mode="after")
    def _ties_have_a_margin(self) -> GroupRewardConfig:
        if (self.advantage_of == "win_rate") != (self.tie_margin is not None):
            raise ValueError(
                "advantage_of: win_rate and tie_margin go together: a difference of scores up to tie_margin is a tie, "
                "without which tiny ones decide (0 for a judge of pairs)"
            )
        return self

    def spread(self) -> Spread:
        """Return what differences from the mean are divided by."""
        return Spread(self.advantage_std, self.advantage_epsilon, self.advantage_floor)


class Scored(Protocol):
    """Samples of one micro-batch and what they scored."""

    @property
    def samples(self) -> PromptBatch:
        """The prompts."""

    @property
    def rewards(self) -> Float[Tensor, " batch"]:
        """What advantages of one sum are taken of."""

    @property
    def novelty(self) -> Float[Tensor, " batch"] | None:
        """How much each differs from the others of its group, where that is used."""

    @property
    def parts(self) -> Mapping[str, Float[Tensor, " batch"]]:
        """The scores of each reward, by its label."""


def score_groups(run: Run, config: GroupRewardConfig, images: Tensor, prompts: Sequence[str], size: int) -> Scores:
    """Score images, each `size` in a row of one prompt: their rewards, or how many comparisons they win."""
    if config.tie_margin is None:
        scores = run.score(images, prompts)
    else:
        scores = run.score.win_rates(images, prompts, size, config.tie_margin)
    if config.advantage_diversity is not None:
        scores.novelty = run.score.novelty(config.advantage_diversity, images, size)
    return scores


def reward_metrics(
    rewards: Float[Tensor, " batch"], parts: Mapping[str, Float[Tensor, " batch"]]
) -> dict[str, Tensor | float]:
    """Return what is logged of rewards: mean and spread of the sum, and the mean of each."""
    each = {f"reward/{name}": scores.mean() for name, scores in parts.items()}
    return {"reward": rewards.mean(), "reward_std": rewards.std(correction=0), **each}


def advantages_of_round(
    run: Run, config: GroupRewardConfig, scored: Sequence[Scored], clip: float | None = None
) -> list[Float[Tensor, " batch"]]:
    """Return the advantages of each micro-batch's samples among those of their prompts, over all processes."""
    if config.advantage_diversity is None:
        return _advantages(run, config, scored, clip)
    favoured = []
    for found, one in zip(_advantages(run, config, scored, None), scored, strict=True):
        assert one.novelty is not None
        favoured.append(favour_novelty(found, one.novelty, clip=clip))
    return favoured


def _advantages(
    run: Run, config: GroupRewardConfig, scored: Sequence[Scored], clip: float | None
) -> list[Float[Tensor, " batch"]]:
    spread = config.spread()
    if config.advantage_of != "each":
        compute = partial(group_advantages, spread=spread, clip=clip)
        return round_advantages([(one.samples.prompts, one.rewards) for one in scored], compute)
    rewards = run.score.rewards
    weights = [one.weight if one.reward.higher_is_better else -one.weight for one in rewards]
    columns = [torch.stack([one.parts[entry.name] for entry in rewards], dim=1) for one in scored]
    each = partial(each_group_advantages, weights=weights, spread=spread, clip=clip)
    return round_advantages([(one.samples.prompts, found) for one, found in zip(scored, columns, strict=True)], each)
