"""DDPO: policy gradient on the sampler's steps with clipped importance ratios (arXiv 2305.13301, DDPO-IS).

Each sampling step is an action with a Gaussian density; the reward of the finished image, normalised by the usual
rewards of the prompt, is the advantage of all its steps. `kl_weight` adds DPOK's KL term (arXiv 2305.16381).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from mmalign.data.batches import PromptBatch
from mmalign.losses import clamped_policy_gradient, clipped_policy_gradient
from mmalign.losses.advantages import PromptStatistics
from mmalign.methods.advantages import AdvantageConfig, drawn_steps, mean_of_drawn, with_advantages
from mmalign.methods.base import LossOutput
from mmalign.methods.group_rewards import advantages_of_round, score_groups
from mmalign.methods.mini_batches import round_advantages
from mmalign.methods.run import Run
from mmalign.methods.trajectory import Rollout, TrajectoryConfig, TrajectoryMethod
from mmalign.scoring.live import Scores


class DDPOConfig(TrajectoryConfig, AdvantageConfig):
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

    @model_validator(mode="after")
    def _has_something_to_compare(self) -> DDPOConfig:
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count {self.min_count} must not be larger than buffer_size {self.buffer_size}")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise ValueError("advantage: group compares the images of a prompt; set images_per_prompt to at least 2")
        if self.advantage != "group" and (self.advantage_of != "total" or self.advantage_diversity is not None):
            key = "advantage_diversity" if self.advantage_of == "total" else f"advantage_of: {self.advantage_of}"
            raise ValueError(f"{key} is for advantage: group; set it")
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
        self.statistics = PromptStatistics(
            buffer_size=config.buffer_size,
            min_count=config.min_count,
            clip=config.advantage_clip,
            spread=config.spread(),
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
        c, rollouts = self.config, super().collect(run, batches)
        if c.advantage == "group":
            found = advantages_of_round(run, c, rollouts, c.advantage_clip)
        else:
            round_of = [(one.samples.prompts, one.rewards) for one in rollouts]
            found = round_advantages(round_of, self.statistics.advantages)
        return with_advantages(rollouts, found)

    def learn(self, run: Run, batch: Rollout, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Train each image on the sampling steps drawn for it, by its id, at this update."""
        batch.wanted = drawn_steps(run, batch, self.config.timestep_fraction)
        return super().learn(run, batch, backward)

    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the clipped objective, a mean over images and the trained steps."""
        c, steps = self.config, batch.learned_steps()
        assert batch.advantages is not None
        now, old = batch.log_probs[steps], batch.old_log_probs[steps]
        objective = clipped_policy_gradient if c.ratio == "clipped" else clamped_policy_gradient
        losses = objective(now, old, batch.advantages.expand_as(now), clip=c.clip)
        clipped = ((now.detach() - old).exp() - 1).abs() > c.clip
        return mean_of_drawn(batch, losses, clipped)

    def scores(self, run: Run, images: Tensor, samples: PromptBatch) -> Scores:
        """Return the rewards of the samples, or how many comparisons they win."""
        return score_groups(run, self.config, images, samples.prompts, self.config.images_per_prompt)

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards remembered for each prompt."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rewards remembered for each prompt."""
        self.statistics.load_state_dict(state)
