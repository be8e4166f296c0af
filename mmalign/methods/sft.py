"""Supervised fine-tuning on good images: the plain denoising objective, without a reference or rejected images.

Source: the baseline `--train_method sft` of Diffusion-DPO (arXiv 2311.12908).
"""

from __future__ import annotations

from typing import ClassVar

from mmalign.methods.base import LabelBatch, LossOutput, Method, Needs, TimestepRange
from mmalign.methods.noising import noise_images
from mmalign.methods.run import Run


class SFTConfig(TimestepRange):
    """Configuration of `sft`."""


class SFT(Method[SFTConfig]):
    """Train the denoising objective on good images: the chosen ones of pairs, or those of a table of images."""

    name: ClassVar[str] = "sft"
    Config = SFTConfig
    needs: ClassVar[Needs] = Needs(source="images")

    def describe(self) -> str:
        """Return the convention of the loss."""
        return "sft: mean squared denoising error of the good images, every noise level weighted alike"

    def loss(self, run: Run, batch: LabelBatch) -> LossOutput:
        """Return the mean denoising error of the images, each at its own random noise level."""
        return LossOutput(noise_images(run, batch, self.config).errors(run.predict).mean())
