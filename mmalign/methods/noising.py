"""Noising of stored images and their denoising errors, shared by the offline preference methods.

Both sides of a pair share the prompt and the timestep, and go through a network in one forward pass of 2B images, the
chosen ones first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor

from mmalign.data.batches import LabelBatch, PairBatch, Segments
from mmalign.losses import denoising_error
from mmalign.methods.base import TimestepRange
from mmalign.methods.run import Run
from pipelines import invert
from pipelines.conditioning import Conditioning

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Noised:
    """Images at a noise level and the training target of the network for them."""

    x_t: Float[Tensor, "batch *latent"]
    t: Shaped[Tensor, " batch"]
    target: Float[Tensor, "batch *latent"]
    cond: Conditioning

    def select(self, rows: slice) -> Noised:
        """Return some of the images."""
        return Noised(self.x_t[rows], self.t[rows], self.target[rows], self.cond[rows])

    def errors(self, predict: Predict) -> Float[Tensor, " batch"]:
        """Return the mean squared error of each image under `run.predict` or `run.reference.predict`."""
        return denoising_error(predict(self.x_t, self.t, self.cond), self.target)

    def pair_errors(self, predict: Predict) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Return the errors of the chosen and of the rejected images, for the result of a function on pairs."""
        return self.pair_errors_of(predict(self.x_t, self.t, self.cond))

    def pair_errors_of(
        self, output: Float[Tensor, "batch *latent"]
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Return the errors of the chosen and of the rejected images, given what a network predicts."""
        chosen, rejected = denoising_error(output, self.target).chunk(2)
        return chosen, rejected

    def segment_errors_of(
        self, output: Float[Tensor, "batch *latent"], segments: Segments
    ) -> tuple[Float[Tensor, "pairs segments"], Float[Tensor, "pairs segments"]]:
        """Return the errors of the chosen and of the rejected videos in each segment, given a network's output."""
        frames = output.transpose(1, 2).flatten(0, 1), self.target.transpose(1, 2).flatten(0, 1)
        errors = denoising_error(*frames).unflatten(0, (len(output), -1))
        chosen, rejected = torch.einsum("bsf,bf->bs", segments.shares.repeat(2, 1, 1).to(errors), errors).chunk(2)
        return chosen, rejected


def noise_pairs(run: Run, batch: PairBatch, timesteps: TimestepRange, *, discount: float = 1.0) -> Noised:
    """Return both sides of each pair at one random timestep with the same Gaussian noise; see `Run.timesteps`."""
    latents, t, cond = _both_sides(run, batch, timesteps, discount)
    noise = run.noise_like(batch.chosen, batch.ids, batch.epoch).repeat(2, *[1] * (latents.ndim - 1))
    return Noised(run.process.add_noise(latents, noise, t), t, run.process.target(latents, noise, t), cond)


def noise_images(run: Run, batch: LabelBatch, timesteps: TimestepRange) -> Noised:
    """Return each labelled image at a random timestep with Gaussian noise of its own."""
    t = run.timesteps(batch, *timesteps.timestep_bounds(run.process.num_train_timesteps))
    noise = run.noise_like(batch.images, batch.ids, batch.epoch)
    x_t, target = run.process.add_noise(batch.images, noise, t), run.process.target(batch.images, noise, t)
    return Noised(x_t, t, target, batch.cond)


class InversionConfig(TimestepRange):
    """Base of the configurations of methods that noise images by DDIM inversion instead of random noise."""

    inversion_steps: int = Field(10, ge=1)
    """steps from the image to its noise level, each at least one more forward pass of both sides"""
    fidelity: Literal["paper", "code"] = "paper"
    """paper: the inversion ends exactly at the timestep; code: on the coarse grid below it, as the published codes do
    with diffusers from 0.22 on"""


def invert_pairs(run: Run, batch: PairBatch, config: InversionConfig, *, renoise: int = 0, eta: float = 0.0) -> Noised:
    """Return both sides of each pair at one random timestep, inverted by the current policy without a gradient.

    The target is the noise that leads from the clean image to where the inversion ended, so it differs from image to
    image. `renoise` and `eta` are those of `pipelines.invert`. With fidelity code the images lie at a level below the
    timestep that the networks are given, and start as noisy as the sampler ends (see `docs/methods/smpo.md`); the
    noise is the one that `add_noise` would have needed at that timestep.
    """
    latents, t, cond = _both_sides(run, batch, config)
    x_t = invert(
        run.generator,
        cond,
        latents,
        t=t,
        steps=config.inversion_steps,
        renoise=renoise,
        grid="exact" if config.fidelity == "paper" else "floor",
        start="clean" if config.fidelity == "paper" else "sampler",
        eta=eta,
        seeds=run.seeds(batch.ids, batch.epoch, "inversion") * 2,
        autocast=run.autocast,
    )
    noise = run.process.implied_noise(latents, x_t, t)
    return Noised(x_t, t, run.process.target(latents, noise, t), cond)


def _both_sides(
    run: Run, batch: PairBatch, timesteps: TimestepRange, discount: float = 1.0
) -> tuple[Tensor, Tensor, Conditioning]:
    t = run.timesteps(batch, *timesteps.timestep_bounds(run.process.num_train_timesteps), discount=discount).repeat(2)
    return torch.cat([batch.chosen, batch.rejected]), t, Conditioning.cat([batch.cond, batch.cond])


def pair_metrics(
    policy: tuple[Tensor, ...], reference: tuple[Tensor, ...], logit: Float[Tensor, " pairs"]
) -> dict[str, Tensor]:
    """Return the metrics of a pairwise loss from (chosen, rejected) errors and logits, all [B].

    The errors of both sides are logged because their difference hides likelihood displacement: the logit can rise
    while the policy denoises both images worse.
    """
    chosen, rejected = (error.detach() for error in policy)
    return {
        "accuracy": pair_accuracy(logit.detach()),
        "logit": logit.detach().mean(),
        "policy_chosen": chosen.mean(),
        "policy_rejected": rejected.mean(),
        "reference_chosen": reference[0].mean(),
        "reference_rejected": reference[1].mean(),
    }


def pair_accuracy(logit: Float[Tensor, " pairs"]) -> Tensor:
    """Return the share of pairs in the right order; a tie counts one half, so that the share starts at 0.5."""
    return ((logit > 0).float() + 0.5 * (logit == 0).float()).mean()
