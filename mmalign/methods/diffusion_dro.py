"""Diffusion-DRO: expert images ranked above the policy's own (arXiv 2510.18353); `mmalign.losses.diffusion_dro`.

The expert images are the good ones of a table, or the chosen sides of pairs. The policy samples its own
images at the start of every round. Its predictions while sampling are the reference for its own images, so that no
copy of its weights is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mmalign.data.batches import LabelBatch
from mmalign.losses import denoising_error, diffusion_dro
from mmalign.methods.base import LossOutput, Method, Needs, TwoPassConfig
from mmalign.methods.run import Run
from pipelines import sample
from pipelines.conditioning import Conditioning
from pipelines.noise import NoiseProcess


class DiffusionDROConfig(TwoPassConfig):
    """Configuration of `diffusion_dro`; errors are means over latent dimensions, and there is no beta."""

    sampling_steps: int = Field(20, ge=1)
    """steps of the DDIM sampler, whose noise levels are the trained timesteps"""
    guidance: float = Field(1.0, ge=0, allow_inf_nan=False)
    """classifier-free guidance scale for sampling the policy's own images; training uses none"""
    eta: float = Field(0.0, ge=0, le=1)
    """noise of the sampler: 0 deterministic, 1 as in DDPM"""
    margin: float = Field(1e-3, ge=0)
    """margin by which the expert's gain must exceed that of the policy's own image for a loss of 0"""
    updates_per_round: int = Field(1, ge=1)
    """optimiser steps on one round of samples, each at other timesteps; with 1 own images affect only the hinge"""


@dataclass
class Ranking:
    """Expert images, and for each update a state, timestep and prediction of the policy's own trajectories."""

    experts: LabelBatch
    drawn_at: int
    timesteps: Int[Tensor, "updates batch"]
    states: Float[Tensor, "updates batch *latent"]
    predictions: Float[Tensor, "updates batch *latent"]


class DiffusionDRO(Method[DiffusionDROConfig]):
    """Lower the denoising error of expert images below that of the policy's own images; no reward, no beta."""

    name: ClassVar[str] = "diffusion_dro"
    Config = DiffusionDROConfig
    needs: ClassVar[Needs] = Needs(source="images", reference=True)
    images_per_sample = 2

    def __init__(self, config: DiffusionDROConfig) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.updates_per_round = config.updates_per_round

    def check(self, process: NoiseProcess) -> None:
        """Refuse a number of steps that the schedule does not have."""
        process.check_steps(self.config.sampling_steps)

    def describe(self) -> str:
        """Return the conventions: the margin and the sampling of the policy's own images."""
        c = self.config
        return (
            f"diffusion_dro: hinge with margin {c.margin:g} on mean errors, own images in {c.sampling_steps} steps at "
            f"guidance {c.guidance:g}, {c.updates_per_round} updates per round"
        )

    def collect(self, run: Run, batches: Iterable[LabelBatch]) -> list[Ranking]:
        """Sample an image of the policy for every expert's prompt, and keep the states that its updates need."""
        return [self._draw(run, batch) for batch in batches]

    @torch.no_grad()
    def _draw(self, run: Run, batch: LabelBatch) -> Ranking:
        c, rows = self.config, torch.arange(len(batch))
        trajectory = sample(
            run.generator,
            batch.cond,
            steps=c.sampling_steps,
            guidance=c.guidance,
            eta=c.eta,
            seeds=run.seeds(batch.ids, batch.epoch),
            record=True,
            autocast=run.autocast,
        )
        run.cost.add(images_sampled=len(batch))
        assert trajectory.states is not None
        draw = partial(torch.randint, c.sampling_steps, (c.updates_per_round,))
        index = torch.stack([draw(generator=run.random("levels", run.step, one)) for one in batch.ids], dim=1)
        device = trajectory.states.device
        timesteps, states = trajectory.timesteps[index].to(device), trajectory.states[index, rows]
        predictions = torch.stack([run.predict(x, t, batch.cond) for x, t in zip(states, timesteps, strict=True)])
        return Ranking(batch, run.step, timesteps, states, predictions)

    def loss(self, run: Run, batch: Ranking) -> LossOutput:
        """Return the mean hinge; expert and own image go through a network in one call, at the same timestep."""
        experts, update = batch.experts, run.step - batch.drawn_at
        t = batch.timesteps[update]
        noise = run.noise_like(experts.images, experts.ids, experts.epoch, f"noise {update}")
        x_t = torch.cat([run.process.add_noise(experts.images, noise, t), batch.states[update]])
        target = torch.cat([run.process.target(experts.images, noise, t), batch.predictions[update]])
        cond, both = Conditioning.cat([experts.cond, experts.cond]), t.repeat(2)
        policy, reference = (
            denoising_error(predict(x_t, both, cond), target).chunk(2)
            for predict in (run.predict, run.reference.predict)
        )
        losses = diffusion_dro(policy[0], reference[0], policy[1], reference[1], margin=self.config.margin)
        return LossOutput(
            losses.mean(),
            {
                "active": (losses.detach() > 0).float().mean(),
                "expert_gain": (reference[0] - policy[0].detach()).mean(),
                "own_gain": (reference[1] - policy[1].detach()).mean(),
            },
        )
