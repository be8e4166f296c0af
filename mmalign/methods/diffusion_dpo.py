"""Diffusion-DPO on pairs of images (arXiv 2311.12908); the objective itself is `mmalign.losses.diffusion_dpo`.

Chosen and rejected share the noise, the timestep and the prompt (`mmalign.methods.noising`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mmalign.losses import diffusion_dpo, diffusion_dpo_logit
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch, PairLossConfig, TimestepRange
from mmalign.methods.noising import noise_pairs, pair_metrics
from mmalign.methods.run import Run


class DiffusionDPOConfig(PairLossConfig, TimestepRange):
    """Configuration of `diffusion_dpo`; conventions as printed in the log: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference (errors are means over latent dimensions)"""
    discount: float = Field(1.0, gt=0, le=1)
    """dense reward: a timestep's probability falls by this factor for each sampling step away from pure noise"""
    discount_steps: int = Field(50, ge=1)
    """number of sampling steps of the schedule, for `discount`"""
    sft_weight: float = Field(0.0, ge=0)
    """adds this many times the policy's error on the chosen image, against likelihood displacement"""


class DiffusionDPO(Method[DiffusionDPOConfig]):
    """Prefer the chosen image over the rejected one, relative to the frozen starting point."""

    name: ClassVar[str] = "diffusion_dpo"
    Config = DiffusionDPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True)
    images_per_sample = 2

    def describe(self) -> str:
        """Return the conventions: the scale of beta, on which the public codes disagree."""
        c = self.config
        extras: list[str] = [c.loss_type]
        if c.label_smoothing:
            extras.append(f"label_smoothing={c.label_smoothing:g}")
        if c.sft_weight:
            extras.append(f"sft_weight={c.sft_weight:g}")
        if c.discount < 1:
            extras.append(f"timesteps discounted by {c.discount:g} per step of {c.discount_steps}")
        return f"diffusion_dpo: beta={c.beta:g}, mean-reduced, half factor on, {', '.join(extras)}"

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the errors of both models on both sides."""
        c = self.config
        discount = c.discount ** (c.discount_steps / run.process.num_train_timesteps)
        noised = noise_pairs(run, batch, c, discount=discount)
        policy = noised.pair_errors(run.predict)
        reference = noised.pair_errors(run.reference.predict)
        loss = diffusion_dpo(
            *policy, *reference, beta=c.beta, loss_type=c.loss_type, label_smoothing=c.label_smoothing
        ).mean()
        if c.sft_weight:
            loss = loss + c.sft_weight * policy[0].mean()
        logit = diffusion_dpo_logit(*policy, *reference, beta=c.beta)
        return LossOutput(loss, pair_metrics(policy, reference, logit))
