"""MaPO: preference without a reference (arXiv 2406.06424); the objective itself is `mmalign.losses.mapo`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mmalign.losses import mapo, mapo_logit
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch, TimestepRange
from mmalign.methods.noising import noise_pairs, pair_accuracy
from mmalign.methods.run import Run


class MaPOConfig(TimestepRange):
    """Configuration of `mapo`; errors are means over latent dimensions."""

    beta: float = Field(0.1, gt=0)
    """weight of the preference against the denoising error of the chosen image"""
    snr: float = Field(0.5, gt=0)
    """the constant signal-to-noise ratio that turns an error into a likelihood"""


class MaPO(Method[MaPOConfig]):
    """Lower the denoising error of the chosen image, below that of the rejected one; no reference is kept."""

    name: ClassVar[str] = "mapo"
    Config = MaPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs")
    images_per_sample = 2

    def describe(self) -> str:
        """Return the conventions: beta weighs the preference term; there is no reference."""
        c = self.config
        return (
            f"mapo: beta={c.beta:g} times the preference, plus the chosen image's error; snr={c.snr:g}, mean-reduced, "
            "times the number of timesteps, no reference"
        )

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the errors of both sides."""
        c, scale = self.config, float(run.process.num_train_timesteps)
        chosen, rejected = noise_pairs(run, batch, c).pair_errors(run.predict)
        loss = mapo(chosen, rejected, beta=c.beta, snr=c.snr, scale=scale).mean()
        logit = mapo_logit(chosen.detach(), rejected.detach(), snr=c.snr, scale=scale)
        return LossOutput(
            loss,
            {
                "accuracy": pair_accuracy(logit),
                "logit": logit.mean(),
                "policy_chosen": chosen.detach().mean(),
                "policy_rejected": rejected.detach().mean(),
            },
        )
