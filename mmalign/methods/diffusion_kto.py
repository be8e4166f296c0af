"""Diffusion-KTO on unpaired labels (arXiv 2404.04465); the objective itself is `mmalign.losses.diffusion_kto`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmalign.losses import diffusion_kto
from mmalign.losses.diffusion_kto import Utility
from mmalign.methods.base import LabelBatch, LossOutput, Method, Needs, TimestepRange
from mmalign.methods.noising import noise_images
from mmalign.methods.reference_point import Centred, centred
from mmalign.methods.run import Run


class DiffusionKTOConfig(TimestepRange):
    """Configuration of `diffusion_kto`; errors are means over latent dimensions, without a half factor."""

    beta: float = Field(1000.0, gt=0)
    """how closely the policy is held to the reference (errors are means over latent dimensions)"""
    utility: Utility = "kahneman-tversky"
    """utility of gains and losses: an S-shaped sigmoid, loss-averse (concave) or risk-seeking (convex)"""
    desirable_weight: float = Field(1.0, gt=0)
    """weight of the good images"""
    undesirable_weight: float = Field(1.0, gt=0)
    """weight of the bad images"""
    sft_weight: float = Field(0.0, ge=0)
    """adds this many times the policy's error on the good images, a mean over all images (a bad one counts 0)"""


class DiffusionKTO(Method[DiffusionKTOConfig]):
    """Denoise good images better than the reference does and bad ones worse, without pairs."""

    name: ClassVar[str] = "diffusion_kto"
    Config = DiffusionKTOConfig
    needs: ClassVar[Needs] = Needs(source="labels", reference=True)

    def describe(self) -> str:
        """Return the conventions: the scale of beta, the utility and the weights."""
        c = self.config
        return (
            f"diffusion_kto: beta={c.beta:g}, mean-reduced, no half factor, {c.utility}, weights good "
            f"{c.desirable_weight:g}, bad {c.undesirable_weight:g}"
            + (f", sft_weight={c.sft_weight:g}" if c.sft_weight else "")
        )

    def collect(self, run: Run, batches: Iterable[LabelBatch]) -> list[Centred]:
        """Find the reference point of the step, the mean gain of all its images on all processes."""
        return centred(batches, lambda batch: self._gain(run, batch)[0])

    def _gain(self, run: Run, batch: LabelBatch) -> tuple[Tensor, Tensor]:
        noised = noise_images(run, batch, self.config)
        policy = noised.errors(run.predict)
        return noised.errors(run.reference.predict) - policy, policy

    def loss(self, run: Run, batch: Centred | LabelBatch) -> LossOutput:
        """Return the mean loss of the images; without `collect` they are the whole step."""
        c, batch = self.config, Centred.of(batch)
        desirable = batch.labels.desirable
        gain, policy = self._gain(run, batch.labels)
        point = batch.reference_point(gain)
        loss = diffusion_kto(
            gain,
            desirable,
            point,
            beta=c.beta,
            utility=c.utility,
            desirable_weight=c.desirable_weight,
            undesirable_weight=c.undesirable_weight,
        ).mean()
        if c.sft_weight:
            loss = loss + c.sft_weight * (policy * desirable).mean()
        return LossOutput(loss, label_metrics(gain.detach(), desirable, policy.detach(), point))


def label_metrics(gain: Tensor, desirable: Tensor, policy: Tensor, point: Tensor) -> dict[str, Tensor]:
    """Return metrics of labelled images; accuracy: the share whose gain has the sign of the label, ties count half."""
    signed = torch.where(desirable, gain, -gain)
    return {
        "accuracy": ((signed > 0).float() + 0.5 * (signed == 0).float()).mean(),
        "gain": gain.mean(),
        "signed_gain": signed.mean(),
        "reference_point": point.clamp_min(0),
        "policy_error": policy.mean(),
        "desirable": desirable.float().mean(),
    }
