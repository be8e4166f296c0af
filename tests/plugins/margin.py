# As the README of release 0.1.0 had it; never edited, since plug-ins of that time are not either.
"""Margin fine-tuning: denoise the chosen image better than the rejected one by a margin, without a reference."""

import torch

from mmalign.losses import denoising_error
from mmalign.methods.base import LossOutput, Method, MethodConfig, Needs
from pipelines.conditioning import Conditioning


class MarginConfig(MethodConfig):
    margin: float = 0.01  # in units of the mean squared denoising error


class Margin(Method[MarginConfig]):
    """Push the two denoising errors of a pair apart."""

    name = "margin"
    Config = MarginConfig
    needs = Needs(source="pairs")
    images_per_sample = 2

    def loss(self, run, batch):
        noise = torch.cat([run.noise_like(batch.chosen, batch.ids, batch.epoch)] * 2)  # shared by the pair
        t = run.timesteps(batch).repeat(2)
        latents = torch.cat([batch.chosen, batch.rejected])
        output = run.predict(run.process.add_noise(latents, noise, t), t, Conditioning.cat([batch.cond, batch.cond]))
        chosen, rejected = denoising_error(output, run.process.target(latents, noise, t)).chunk(2)
        hinge = torch.relu(self.config.margin - (rejected - chosen))
        return LossOutput((chosen + hinge).mean(), {"gap": (rejected - chosen).detach().mean()})
