"""PRDP: proximal reward difference prediction on the policy's own samples (arXiv 2402.08714).

For every two images of a prompt, the difference of the policy's trajectory log-ratios to the reference is fitted to
the difference of their rewards, in units of beta. Where that holds for all pairs, the policy is the reference tilted
by exp(reward / beta), the optimum of reward minus beta times KL. The objective itself is `mmalign.losses.prdp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

import torch
from pydantic import Field

from mmalign.data.batches import PromptBatch
from mmalign.losses import prdp
from mmalign.methods.base import LossOutput
from mmalign.methods.run import Run
from mmalign.methods.trajectory import Rollout, TrajectoryConfig, TrajectoryMethod


class PRDPConfig(TrajectoryConfig):
    """Configuration of `prdp`; log-ratios are means over latent dimensions, so beta and clip fit any latent size."""

    images_per_prompt: int = Field(8, ge=2)
    """images sampled for each prompt; all pairs among them are compared"""
    updates_per_round: int = Field(4, ge=1)
    """passes over one round of samples; each is one optimiser step, or one for each of its mini-batches"""
    beta: float = Field(10.0, gt=0)
    """reward difference for a log-ratio of 1 nat per dimension: the paper's beta times the number of dimensions"""
    clip: float = Field(1e-4, gt=0)
    """clip of the change of a step's log-ratio within a round, in nats per dimension; .inf: no clipping"""
    mode: Literal["online", "offline"] = "online"
    """online: learn from the policy's own samples; offline: from the frozen reference's"""


class PRDP(TrajectoryMethod[PRDPConfig]):
    """Fit the differences of the policy's log-ratios to reward differences of its own images; for any reward."""

    name: ClassVar[str] = "prdp"
    Config = PRDPConfig
    whole_reference: ClassVar[bool] = True

    def describe(self) -> str:
        """Return the conventions: the units of beta and clip."""
        c = self.config
        return (
            f"prdp ({c.mode}): beta={c.beta:g} reward per nat/dimension, clip={c.clip:g} nat/dimension, "
            f"{c.images_per_prompt} images per prompt, {c.updates_per_round} updates per round, "
            f"guidance {c.guidance:g}"
        )

    def sampler(self, run: Run) -> AbstractContextManager[None]:
        """Sample from the policy, or offline from the reference."""
        return nullcontext() if self.config.mode == "online" else run.reference.active()

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[Rollout]:
        """Sample and score; offline, also compute the policy's log-probs before its updates begin."""
        rollouts = super().collect(run, batches)
        if self.config.mode == "offline":
            for rollout in rollouts:
                rollout.old_means, rollout.old_log_probs = self.replay_all(run, rollout)
        return rollouts

    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the mean over all pairs of all prompts."""
        assert batch.reference_log_probs is not None
        log_ratio = (batch.log_probs - batch.reference_log_probs).T.split(self.config.images_per_prompt)
        old = (batch.old_log_probs - batch.reference_log_probs).T.split(self.config.images_per_prompt)
        rewards = batch.rewards.split(self.config.images_per_prompt)
        pairs = [
            prdp(*group, beta=self.config.beta, clip=self.config.clip)
            for group in zip(log_ratio, old, rewards, strict=True)
        ]
        total = torch.stack([group.detach().sum(1) for group in log_ratio])
        return LossOutput(torch.cat(pairs).mean(), {"log_ratio_to_reference": total.mean()})
