"""Reward backpropagation: maximise a differentiable reward by its gradient through the sampler.

One implementation of several methods, which differ in the sampling steps that carry the gradient (`truncation`):
AlignProp (arXiv 2310.03739), DRaFT, DRaFT-K and DRaFT-LV (arXiv 2309.17400), ReFL (arXiv 2304.05977).

Differences to the official codes: AlignProp's first code, and TRL's trainer after it, redraw the truncation at every
step, which is `truncation: bernoulli`; its second code scores images of range [0.5, 1] by undoing the normalisation
twice; ReFL's gives the network the loop's index as the timestep and leaves out the paper's pre-training loss. Images
are in [0, 1] here and timesteps the scheduler's; only `distance_weight` adds a term to the reward.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.batches import PromptBatch
from mmalign.losses import denoising_error
from mmalign.methods.base import LossOutput, Method, Needs
from mmalign.methods.run import WATCHED, Run
from mmalign.methods.sampling import SamplingConfig
from pipelines.gradient_sampling import Truncation, sample_with_gradient
from pipelines.noise import NoiseProcess


class AlignPropConfig(SamplingConfig):
    """Configuration of `align_prop`; the objective is the mean of the weighted sum of the rewards."""

    truncation: Literal["full", "last-k", "uniform", "gaussian", "bernoulli", "low-variance", "refl"] = "uniform"
    """which sampling steps carry the gradient: see `pipelines.truncation.MODES`"""
    k: int = Field(1, ge=1)
    """number of trained steps with `last-k`"""
    repeats: int = Field(2, ge=1)
    """re-noised copies of each image with `low-variance`"""
    target: float | None = None
    """rewards above this value give no gradient (ReFL's margin); null: no limit"""
    distance_weight: float = Field(0.0, ge=0)
    """adds this many times the mean squared difference of policy and reference on the policy's own noised images"""
    checkpoint: bool = True
    """recompute network calls and decoder in the backward pass, so that memory does not grow with the steps"""
    decode_frames: int | None = Field(None, ge=1)
    """for video models: decode so many latent frames alone, spread evenly, and score these as a video (VADER); null:
    whole videos"""


class AlignProp(Method[AlignPropConfig]):
    """Maximise the reward by its gradient through the last steps, or random steps, of the sampler."""

    name: ClassVar[str] = "align_prop"
    Config = AlignPropConfig
    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="differentiable")

    def __init__(self, config: AlignPropConfig) -> None:
        """Resolve the truncation from the configuration."""
        super().__init__(config)
        self.images_per_sample = config.images_per_prompt
        self.truncation = Truncation(config.truncation, k=config.k, repeats=config.repeats)

    def check(self, process: NoiseProcess) -> None:
        """Refuse a sampler that the schedule does not support, or more trained steps than sampling steps."""
        process.check_steps(self.config.sampling_steps)
        self.truncation.draw(self.config.sampling_steps, torch.Generator())

    def describe(self) -> str:
        """Return what is trained and what is maximised."""
        c = self.config
        extras = [f"truncation {c.truncation}" + (f" {c.k}" if c.truncation == "last-k" else "")]
        extras += [f"target {c.target:g}"] if c.target is not None else []
        extras += [f"distance_weight {c.distance_weight:g}"] if c.distance_weight else []
        return f"align_prop: {', '.join(extras)}, {c.sampling_steps} steps, eta {c.eta:g}, guidance {c.guidance:g}"

    def loss(self, run: Run, batch: PromptBatch) -> LossOutput:
        """Return minus the mean reward of new samples of the prompts, with its graph through the sampler."""
        c, samples = self.config, batch.repeat(self.config.images_per_prompt)
        drawn = sample_with_gradient(
            run.generator,
            samples.cond,
            truncation=self.truncation,
            rng=[torch.Generator().manual_seed(seed) for seed in run.seeds(samples.ids, samples.epoch, "truncation")],
            seeds=run.seeds(samples.ids, samples.epoch),
            steps=c.sampling_steps,
            guidance=c.guidance,
            eta=c.eta,
            checkpoint=c.checkpoint,
            autocast=run.autocast,
        )
        images, prompts = self._decode(run, drawn.latents), samples.prompts * drawn.repeats
        run.show(images, prompts)
        scores = run.score(images, prompts)
        gain = scores.total if c.target is None else scores.total.clamp(max=c.target)
        distance = self._distance(run, samples, drawn.latents[: len(samples)].detach())
        metrics: dict[str, Tensor | float] = {
            "reward": scores.total.mean(),
            "distance": distance,
            "trained_steps": sum(map(len, drawn.grad_steps)) / len(samples),
        }
        metrics |= {f"reward/{name}": score.mean() for name, score in scores.parts.items()}
        loss = -gain.mean()
        return LossOutput(loss + c.distance_weight * distance if c.distance_weight else loss, metrics)

    def begin(self, run: Run) -> None:
        """Refuse `decode_frames` for a model of images."""
        if self.config.decode_frames is not None and run.generator.modality != "video":
            raise UserError("method.decode_frames is for video models, and this one makes images; remove it")

    def _decode(self, run: Run, latents: Tensor) -> Tensor:
        return run.decode(latents, checkpoint=self.config.checkpoint, frames=self.config.decode_frames)

    def _distance(self, run: Run, samples: PromptBatch, latents: Tensor) -> Tensor:
        """Return the mean squared difference of policy and reference on noised samples; a few if it is only logged."""
        trained = self.config.distance_weight > 0
        count = len(latents) if trained else min(WATCHED, len(latents))
        ids, epoch, x0, cond = samples.ids[:count], samples.epoch, latents[:count], samples.cond[:count]
        drawn = (run.random("distance", name, epoch) for name in ids)
        t = torch.cat([run.process.sample_timesteps(1, generator=source) for source in drawn]).to(x0.device)
        x_t = run.process.add_noise(x0, run.noise_like(x0, ids, epoch, "distance"), t)
        with torch.set_grad_enabled(trained):
            return denoising_error(run.predict(x_t, t, cond), run.reference.predict(x_t, t, cond)).mean()
