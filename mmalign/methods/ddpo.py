"""DDPO: policy gradient on the sampler's steps with clipped importance ratios (arXiv 2305.13301, DDPO-IS).

Each sampling step is an action with a Gaussian density; the reward of the finished image, normalised by the usual
rewards of the prompt, is the advantage of all its steps. `kl_weight` adds DPOK's KL term (arXiv 2305.16381).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from mmalign.core.distributed import gather, rank
from mmalign.data.batches import PromptBatch
from mmalign.losses import clamped_policy_gradient, clipped_policy_gradient
from mmalign.losses.advantages import PromptStatistics, group_advantages
from mmalign.methods.base import LossOutput
from mmalign.methods.run import Run
from mmalign.methods.trajectory import Rollout, TrajectoryConfig, TrajectoryMethod


class DDPOConfig(TrajectoryConfig):
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
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """share of the random sampling steps that an update trains on, redrawn at every update"""

    @model_validator(mode="after")
    def _has_something_to_compare(self) -> DDPOConfig:
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count {self.min_count} must not be larger than buffer_size {self.buffer_size}")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise ValueError("advantage: group compares the images of a prompt; set images_per_prompt to at least 2")
        return self


class DDPO(TrajectoryMethod[DDPOConfig]):
    """Raise the probability of steps that led to images better than the prompt's average; for any reward."""

    name: ClassVar[str] = "ddpo"
    Config = DDPOConfig
    compares_images: ClassVar[bool] = False

    def __init__(self, config: DDPOConfig) -> None:
        """Start without statistics."""
        super().__init__(config)
        self.statistics = PromptStatistics(
            buffer_size=config.buffer_size, min_count=config.min_count, clip=config.advantage_clip
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
        prompts = [prompt for rollout in rollouts for prompt in rollout.samples.prompts]
        rewards = torch.cat([rollout.rewards for rollout in rollouts])
        everywhere = gather((prompts, rewards.tolist()))
        all_prompts = [prompt for theirs, _ in everywhere for prompt in theirs]
        all_rewards = rewards.new_tensor([reward for _, theirs in everywhere for reward in theirs])
        if self.config.advantage == "group":
            found = group_advantages(all_prompts, all_rewards, clip=self.config.advantage_clip)
        else:
            found = self.statistics.advantages(all_prompts, all_rewards)
        mine = found[rank() * len(prompts) :][: len(prompts)]
        for rollout, advantages in zip(rollouts, mine.split([len(r.rewards) for r in rollouts]), strict=True):
            rollout.advantages = advantages
        return rollouts

    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the clipped objective, a mean over images and the trained steps."""
        c = self.config
        assert batch.advantages is not None
        random_steps = torch.tensor(batch.learned_steps())
        count = max(1, round(c.timestep_fraction * len(random_steps)))
        order = torch.randperm(len(random_steps), generator=run.random("steps", run.step))
        steps = random_steps[order[:count].sort().values].to(batch.log_probs.device)
        now, old = batch.log_probs[steps], batch.old_log_probs[steps]
        objective = clipped_policy_gradient if c.ratio == "clipped" else clamped_policy_gradient
        losses = objective(now, old, batch.advantages.expand_as(now), clip=c.clip)
        clipped = ((now.detach() - old).exp() - 1).abs() > c.clip
        return LossOutput(losses.mean(), {"clipped": clipped.float().mean()})

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards remembered for each prompt."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rewards remembered for each prompt."""
        self.statistics.load_state_dict(state)
