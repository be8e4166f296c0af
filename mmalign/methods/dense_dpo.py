"""Dense-reward DPO on the policy's own samples (arXiv 2402.08265); the objective is `mmalign.losses.dense_dpo`.

A round of scored trajectories is replayed over many updates. Each compares a few images of every prompt, at a few
sampling steps, early ones more often. The offline variant, on stored pairs, is `diffusion_dpo` with `discount`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.losses import dense_logit, discounted_probabilities, list_mle
from mmalign.methods.base import LossOutput
from mmalign.methods.run import Run
from mmalign.methods.trajectory import Rollout, TrajectoryConfig, TrajectoryMethod


class DenseDPOConfig(TrajectoryConfig):
    """Configuration of `dense_dpo`; log-ratios are means over latent dimensions, as in the authors' code."""

    images_per_prompt: int = Field(5, ge=2)
    """images sampled for each prompt in a round"""
    kept: int | None = Field(None, ge=2)
    """images of each prompt that are trained on, evenly spaced in the ranking by reward; null: all"""
    compared: int = Field(2, ge=2)
    """images of each prompt that an update compares, drawn anew; more than two are ranked (ListMLE)"""
    updates_per_round: int = Field(10, ge=1)
    """passes over one round of samples; each is one optimiser step, or one for each of its mini-batches"""
    gamma: float = Field(0.9, gt=0, le=1)
    """a sampling step is drawn with probability proportional to gamma ** k, k = 0 the first; 1: uniform"""
    steps_per_image: int = Field(3, ge=1)
    """sampling steps drawn for an update, the same for all compared images"""
    scale: float = Field(10.0, gt=0)
    """factor from the mean log-ratio to the logit"""
    clip: float = Field(1e-4, gt=0)
    """with fidelity code: a step's log-ratio is clamped to +- clip nats per dimension, without a gradient beyond"""
    fidelity: Literal["paper", "code"] = "code"
    """paper: log-ratios as in the formula; code: clamped at `clip`, as in the published runs"""

    @model_validator(mode="after")
    def _enough_images(self) -> DenseDPOConfig:
        kept = self.kept or self.images_per_prompt
        if not self.compared <= kept <= self.images_per_prompt:
            raise ValueError(
                f"compared {self.compared} of kept {kept} of images_per_prompt {self.images_per_prompt}: "
                "each must not be larger than the next"
            )
        return self


class DenseDPO(TrajectoryMethod[DenseDPOConfig]):
    """Prefer the chains of better images over those of worse ones, early steps above all; for any reward."""

    name: ClassVar[str] = "dense_dpo"
    Config = DenseDPOConfig

    def describe(self) -> str:
        """Return the conventions: discount, scale and clamp."""
        c = self.config
        cut = f"clamped at {c.clip:g} nat/dimension" if c.fidelity == "code" else "unclamped"
        return (
            f"dense_dpo: gamma={c.gamma:g}, scale={c.scale:g} on log-ratios {cut} (fidelity {c.fidelity}), "
            f"{c.compared} of {c.images_per_prompt} images per prompt at {c.steps_per_image} steps per update, "
            f"{c.updates_per_round} updates per round, guidance {c.guidance:g}"
        )

    def learn(self, run: Run, batch: Rollout, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Evaluate policy and reference on the images and steps of this update only."""
        batch.wanted = self._drawn(run, batch)[1] > 0
        if batch.reference_means is None:
            with run.reference.active():
                batch.reference_log_probs = self.replay_all(run, batch)[1]
        return super().learn(run, batch, backward)

    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the mean over prompts; accuracy is the share of neighbours in the ranking in the right order."""
        c = self.config
        assert batch.reference_log_probs is not None
        images, counts = self._drawn(run, batch)
        rows = images.flatten()
        log_ratio = (batch.log_probs - batch.reference_log_probs)[:, rows]
        clip = c.clip if c.fidelity == "code" else math.inf
        logit = dense_logit(log_ratio, counts[:, rows], scale=c.scale, clip=clip).view_as(images)
        reward = batch.rewards[images]
        seen = log_ratio.detach()[counts[:, rows] > 0].abs()
        ranked = logit.detach().gather(1, reward.argsort(dim=1, descending=True, stable=True))
        steps = ranked[:, :-1] - ranked[:, 1:]
        return LossOutput(
            list_mle(logit, reward).mean(),
            {
                "accuracy": ((steps > 0).float() + 0.5 * (steps == 0).float()).mean(),
                "clipped": (seen > clip).float().mean(),
            },
        )

    def _drawn(self, run: Run, batch: Rollout) -> tuple[Int[Tensor, "prompts compared"], Int[Tensor, "steps batch"]]:
        """Return the compared images, in random order, and how often each of their steps was drawn."""
        c, device = self.config, batch.rewards.device
        random_steps = torch.tensor(batch.learned_steps())
        law = discounted_probabilities(len(random_steps), c.gamma)
        images, counts = [], torch.zeros(batch.old_log_probs.shape, dtype=torch.long)
        for first in range(0, len(batch.rewards), c.images_per_prompt):
            source = run.random("compared", run.step, batch.samples.ids[first])
            kept = first + spaced(batch.rewards[first : first + c.images_per_prompt], c.kept or c.images_per_prompt)
            chosen = kept[torch.randperm(len(kept), generator=source)[: c.compared]]
            steps = random_steps[torch.multinomial(law, c.steps_per_image, replacement=True, generator=source)]
            counts[:, chosen] += steps.bincount(minlength=len(counts)).unsqueeze(1)
            images.append(chosen)
        return torch.stack(images).to(device), counts.to(device)


def spaced(rewards: Float[Tensor, " images"], count: int) -> Int[Tensor, " kept"]:
    """Return the images at `count` evenly spaced ranks, best and worst included, in the order of the ranking."""
    if count == len(rewards):
        return torch.arange(count)
    places = torch.linspace(0, len(rewards) - 1, count).round().long()
    return rewards.cpu().argsort(stable=True)[places]
