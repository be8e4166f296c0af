"""Diffusion-DPO on pairs of images (arXiv 2311.12908); the objective itself is `mmalign.losses.diffusion_dpo`.

Chosen and rejected share the noise, the timestep and the prompt, and go through the network in one forward pass of
2B images: once for the policy, once for the reference.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmalign.losses import denoising_error, diffusion_dpo, diffusion_dpo_logit
from mmalign.losses.diffusion_dpo import LossType
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch, TimestepRange
from mmalign.run import Run
from pipelines.conditioning import Conditioning
from pipelines.noise import NoiseProcess


class DiffusionDPOConfig(TimestepRange):
    """Configuration of `diffusion_dpo`; conventions as printed in the log: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference (errors are means over latent dimensions)"""
    loss_type: LossType = "sigmoid"
    """sigmoid: DPO; ipo: a regression to a fixed margin; hinge: no gradient beyond logit 1"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """assumed probability that a label is wrong"""
    sft_weight: float = Field(0.0, ge=0)
    """adds this many times the policy's error on the chosen image, against likelihood displacement"""


class DiffusionDPO(Method[DiffusionDPOConfig]):
    """Prefer the chosen image over the rejected one, relative to the frozen starting point."""

    name: ClassVar[str] = "diffusion_dpo"
    Config = DiffusionDPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True)
    images_per_sample = 2

    def check(self, process: NoiseProcess) -> None:
        """Refuse a range of timesteps that the schedule has not."""
        self.config.timestep_bounds(process.num_train_timesteps)

    def describe(self) -> str:
        """Return what beta means here, the point on which the public codes disagree."""
        c = self.config
        extras: list[str] = [c.loss_type]
        if c.label_smoothing:
            extras.append(f"label_smoothing={c.label_smoothing:g}")
        if c.sft_weight:
            extras.append(f"sft_weight={c.sft_weight:g}")
        return f"diffusion_dpo: beta={c.beta:g}, mean-reduced, half factor on, {', '.join(extras)}"

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the errors of both models on both sides."""
        c = self.config
        noise = torch.cat([run.noise_like(batch.chosen, batch.ids, batch.epoch)] * 2)
        t = run.timesteps(batch, *c.timestep_bounds(run.process.num_train_timesteps)).repeat(2)
        latents = torch.cat([batch.chosen, batch.rejected])
        cond = Conditioning.cat([batch.cond, batch.cond])
        x_t = run.process.add_noise(latents, noise, t)
        target = run.process.target(latents, noise, t)

        policy = denoising_error(run.predict(x_t, t, cond), target).chunk(2)
        reference = denoising_error(run.reference.predict(x_t, t, cond), target).chunk(2)
        loss = diffusion_dpo(
            *policy, *reference, beta=c.beta, loss_type=c.loss_type, label_smoothing=c.label_smoothing
        ).mean()
        if c.sft_weight:
            loss = loss + c.sft_weight * policy[0].mean()
        logit = diffusion_dpo_logit(*policy, *reference, beta=c.beta).detach()
        return LossOutput(loss, pair_metrics(policy, reference, logit))


def pair_metrics(policy: tuple[Tensor, ...], reference: tuple[Tensor, ...], logit: Tensor) -> dict[str, Tensor]:
    """Return the metrics of a pairwise loss from (chosen, rejected) errors and logits, all [B].

    Both sides' raw errors are there because their difference hides likelihood displacement: the logit can rise while
    the policy denoises both images worse. In the accuracy a tie counts one half, so it reads 0.5 at the start, not 0.
    """
    chosen, rejected = (error.detach() for error in policy)
    return {
        "accuracy": ((logit > 0).float() + 0.5 * (logit == 0).float()).mean(),
        "logit": logit.mean(),
        "policy_chosen": chosen.mean(),
        "policy_rejected": rejected.mean(),
        "reference_chosen": reference[0].mean(),
        "reference_rejected": reference[1].mean(),
    }
