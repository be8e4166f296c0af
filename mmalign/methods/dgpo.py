"""DGPO: prefer the better images of a prompt to the worse ones, as a group (arXiv 2510.08425); `mmalign.losses.dgpo`.

All images of a prompt are noised by one noise, and stay together in every batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.data.batches import PromptBatch
from mmalign.losses import denoising_error, dgpo, moved_enough
from mmalign.methods.base import LossOutput
from mmalign.methods.forward_process import (
    ForwardProcessConfig,
    ForwardProcessMethod,
    LevelGrid,
    NoisedSamples,
    OldDecay,
    SamplerSteps,
)
from mmalign.methods.noising import Noised
from mmalign.methods.run import Run
from pipelines.guidance import guided_predictor


class DGPOConfig(ForwardProcessConfig):
    """Configuration of `dgpo`; errors are means over latent dimensions, of the velocity."""

    levels: int = Field(4, ge=1)
    """noise levels at which an update trains on an image"""
    level_grid: LevelGrid = "sampler"
    """which levels: so many of the sampler's, or as in `nft`"""
    sampler_steps: SamplerSteps = (0, 7)
    """steps of the sampler, [first, end), whose levels are trained on; 0 is the noisiest; null: all"""
    shared_levels: bool = True
    """the images of an update have one level at a time, instead of one each"""
    old_decay: OldDecay = (0, 0.001, 0.3)
    """how the old policy follows, after every update; as in `nft`"""
    reference_weight: float = Field(0.02, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of the predictions of policy and reference"""
    beta: float = Field(100.0, gt=0, allow_inf_nan=False)
    """how soon a group that is in better order than the reference has it counts less"""
    clip: float | None = Field(1e-2, gt=0)
    """an image whose likelihood has moved from the old policy's by more, in its advantage's direction, is left; null:
    never"""
    advantage_clip: float = Field(5.0, gt=0, allow_inf_nan=False)
    """advantages are clipped to +- this value"""
    compare_to: Literal["reference", "old"] = "reference"
    """whose errors the order of a group is compared with: the reference's, or the old policy's"""
    reference_guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """classifier-free guidance scale of the reference's predictions"""
    old_samples_after: int | None = Field(200, ge=0)
    """after so many optimiser steps the old policy draws the samples, until then the policy; null: never"""
    shared_noise: bool = True
    """one noise for all images of a prompt"""

    @model_validator(mode="after")
    def _guided_reference_is_used(self) -> DGPOConfig:
        if self.reference_guidance != 1 and self.compare_to == "old" and not self.reference_weight:
            raise ValueError(
                "reference_guidance changes nothing with compare_to: old and reference_weight: 0; remove it"
            )
        return self


class DGPO(ForwardProcessMethod[DGPOConfig]):
    """Order the images of a prompt by their advantages, relative to the reference."""

    name: ClassVar[str] = "dgpo"
    Config = DGPOConfig
    follows: ClassVar[Literal["round", "update"]] = "update"
    compares_images: ClassVar[bool] = True

    def describe(self) -> str:
        """Return the conventions: beta, the clip, and the sampling."""
        c = self.config
        clip = "no clip" if c.clip is None else f"clip {c.clip:g}"
        return (
            f"dgpo: beta={c.beta:g} on mean errors, {c.images_per_prompt} images compared with the {c.compare_to}, "
            f"{clip}, reference {c.reference_weight:g} at guidance {c.reference_guidance:g}, samples "
            f"in {c.sampling_steps} steps at guidance {c.guidance:g}, {c.levels} levels"
        )

    @property
    def whole_reference(self) -> bool:
        """Whether the loss needs the reference's prediction of every sample."""
        return super().whole_reference or self.config.compare_to == "reference"

    def sampler(self, run: Run) -> AbstractContextManager[None]:
        """Let the policy sample at first, and later the old policy."""
        after = self.config.old_samples_after
        return self.old.applied() if after is not None and run.step > after else nullcontext()

    def reference(self, run: Run, noised: Noised) -> Float[Tensor, "batch *latent"]:
        """Return the reference's prediction, with guidance."""
        scale = self.config.reference_guidance
        if scale == 1:
            return super().reference(run, noised)
        with run.reference.active():
            predict = guided_predictor(run.generator, noised.cond, scale, autocast=run.autocast)
            return predict(noised.x_t, noised.t).to(noised.x_t.dtype)

    def noise_names(self, samples: PromptBatch) -> list[str]:
        """Give all images of a prompt one noise."""
        return [name.rpartition("/")[0] if self.config.shared_noise else name for name in samples.ids]

    def loss(self, run: Run, batch: NoisedSamples) -> LossOutput:
        """Return the mean over the samples."""
        c, target = self.config, batch.noised.target
        errors, old = denoising_error(batch.policy, target), denoising_error(batch.old, target)
        compared = old if c.compare_to == "old" else denoising_error(batch.reference, target)
        advantages = batch.advantages.clamp(-c.advantage_clip, c.advantage_clip)
        metrics = {}
        if c.clip is not None:
            held = moved_enough(errors, old, advantages, clip=c.clip)
            errors, metrics["clipped"] = torch.where(held, errors.detach(), errors), held.float().mean()
        losses = dgpo(errors, compared, advantages, group=c.images_per_prompt, beta=c.beta)
        return LossOutput(losses.mean(), metrics)
