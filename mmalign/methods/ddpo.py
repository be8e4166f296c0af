"""DDPO: policy gradient on the sampler's steps with clipped importance ratios (arXiv 2305.13301, DDPO-IS).

Each sampling step is an action with a Gaussian density; the reward of the finished image, normalised by the usual
rewards of the prompt, is the advantage of all its steps. `kl_weight` adds DPOK's KL term (arXiv 2305.16381).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.data.batches import PromptBatch
from mmalign.losses import clamped_policy_gradient, clipped_policy_gradient
from mmalign.losses.advantages import PromptStatistics, Spread
from mmalign.methods.base import LossOutput
from mmalign.methods.group_rewards import GroupRewardConfig, advantages_of_round, score_groups
from mmalign.methods.mini_batches import round_advantages
from mmalign.methods.run import Run
from mmalign.methods.trajectory import Rollout, TrajectoryConfig, TrajectoryMethod
from mmalign.scoring.live import Scores


class DDPOConfig(TrajectoryConfig, GroupRewardConfig):
    """Configuration of `ddpo`; the ratio is of densities per latent dimension, as in the authors' code."""

    clip: float = Field(1e-4, gt=0)
    """importance ratios outside 1 +- clip give no gradient where that would push them further"""
    ratio: Literal["clipped", "clamped"] = "clipped"
    """clipped: PPO's objective, the worse of the ratio and its clip; clamped: DPOK's, clipped on both sides"""
    advantage: Literal["running", "group"] = "running"
    """reward against the prompt's running mean and deviation, or against the images of the prompt in this round"""
    buffer_size: int = Field(16, ge=2)
    """rewards remembered for each prompt"""
    min_count: int = Field(16, ge=2)
    """rewards of a prompt that must be known before its own mean and deviation are used instead of the round's"""
    advantage_clip: float = Field(5.0, gt=0)
    """advantages are clipped to +- this value"""
    advantage_std: Literal["group", "batch", "none"] = "group"
    """an advantage is in units of the spread of: group, the rewards its mean is of; batch, the round's; none: of 1"""
    advantage_epsilon: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """added to the spread"""
    advantage_floor: float = Field(1e-5, ge=0, allow_inf_nan=False)
    """least spread, in units of the largest absolute reward: smaller differences are rounding"""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """share of the learned sampling steps that an update trains on, redrawn at every update for each image"""

    @model_validator(mode="after")
    def _has_something_to_compare(self) -> DDPOConfig:
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count {self.min_count} must not be larger than buffer_size {self.buffer_size}")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise ValueError("advantage: group compares the images of a prompt; set images_per_prompt to at least 2")
        if self.advantage_of != "total" and self.advantage != "group":
            raise ValueError(f"advantage_of: {self.advantage_of} is for advantage: group; set it")
        return self


class DDPO(TrajectoryMethod[DDPOConfig]):
    """Raise the probability of steps that led to images better than the prompt's average; for any reward."""

    name: ClassVar[str] = "ddpo"
    Config = DDPOConfig
    compares_images: ClassVar[bool] = False

    def __init__(self, config: DDPOConfig) -> None:
        """Start without statistics."""
        super().__init__(config)
        self.whole_first = config.timestep_fraction == 1
        self.spread = Spread(config.advantage_std, config.advantage_epsilon, config.advantage_floor)
        self.statistics = PromptStatistics(
            buffer_size=config.buffer_size,
            min_count=config.min_count,
            clip=config.advantage_clip,
            spread=self.spread,
        )

    def describe(self) -> str:
        """Return the conventions: the units of the clip."""
        c = self.config
        return (
            f"ddpo: clip={c.clip:g} on ratios per dimension, {c.advantage} advantages, "
            f"{c.images_per_prompt} images per prompt, {c.updates_per_round} updates per round, "
            f"guidance {c.guidance:g}"
        )

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[Rollout]:
        """Sample, score, and turn the rewards of the whole round, on all ranks, into advantages."""
        rollouts = super().collect(run, batches)
        if self.config.advantage == "group":
            found = advantages_of_round(run, self.config, rollouts, self.spread, self.config.advantage_clip)
        else:
            round_of = [(one.samples.prompts, one.rewards) for one in rollouts]
            found = round_advantages(round_of, self.statistics.advantages)
        for rollout, advantages in zip(rollouts, found, strict=True):
            rollout.advantages = advantages
        return rollouts

    def learn(self, run: Run, batch: Rollout, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Train each image on the sampling steps drawn for it, by its id, at this update."""
        batch.wanted = self._drawn(run, batch) if self.config.timestep_fraction < 1 else None
        return super().learn(run, batch, backward)

    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the clipped objective, a mean over images and the trained steps."""
        c, steps = self.config, batch.learned_steps()
        assert batch.advantages is not None
        now, old = batch.log_probs[steps], batch.old_log_probs[steps]
        objective = clipped_policy_gradient if c.ratio == "clipped" else clamped_policy_gradient
        losses = objective(now, old, batch.advantages.expand_as(now), clip=c.clip)
        clipped = ((now.detach() - old).exp() - 1).abs() > c.clip
        if batch.wanted is not None:
            losses, clipped = losses[batch.wanted[steps]], clipped[batch.wanted[steps]]
        return LossOutput(losses.mean(), {"clipped": clipped.float().mean()})

    def scores(self, run: Run, images: Tensor, samples: PromptBatch) -> Scores:
        """Return the rewards of the samples, or how many comparisons they win."""
        return score_groups(run, self.config, images, samples.prompts, self.config.images_per_prompt)

    def _drawn(self, run: Run, batch: Rollout) -> Bool[Tensor, "steps batch"]:
        """Return which steps each image is trained on: as many for all, at least one."""
        steps = torch.tensor(batch.learned_steps())
        count = max(1, round(self.config.timestep_fraction * len(steps)))
        drawn = torch.zeros(batch.old_log_probs.shape, dtype=torch.bool)
        for column, name in enumerate(batch.samples.ids):
            source = run.random("steps", run.step, name, batch.samples.epoch)
            drawn[steps[torch.randperm(len(steps), generator=source)[:count]], column] = True
        return drawn.to(batch.old_log_probs.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards remembered for each prompt."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rewards remembered for each prompt."""
        self.statistics.load_state_dict(state)
