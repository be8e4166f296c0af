"""A generator without a network: the ideal denoiser of Gaussian data, for latents of any shape.

Every latent of a sample is N(mean, spread^2) by itself, the mean given by the prompt. Then the best prediction of the
clean latents and of the noise at any level has a closed form, which `posterior` gives by its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pipelines import Conditioning, Generator, NoiseProcess

SPREAD = 0.5
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def level(scheduler: Any, t: float) -> tuple[float, float]:
    """Return signal and noise coefficients at `t` (-1: the end of sampling), straight from the scheduler's table."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = max(t, 0.0) / 1000
        return 1 - sigma, sigma
    squared = float(scheduler.final_alpha_cumprod if t < 0 else scheduler.alphas_cumprod[int(t)])
    return squared**0.5, (1 - squared) ** 0.5


def posterior(x: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x0 | x] and E[noise | x] of ``x = alpha x0 + sigma noise`` with x0 ~ N(mean, SPREAD^2)."""
    surprise = (x - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)
    return mean + alpha * SPREAD**2 * surprise, sigma * surprise


class IdealGenerator(Generator):
    """Predicts the posterior mean; its one weight is a factor on the prompt's mean. Computes in float64."""

    family = "ideal"
    network_name = "network"
    text_names = ()

    def __init__(self, prediction: str, shape: tuple[int, ...], **options: Any) -> None:
        """Make the process of a prediction type ("flow" for flow matching); `options` are the scheduler's."""
        if prediction == "flow":
            self.scheduler = FlowMatchEulerDiscreteScheduler(**options)
        else:
            self.scheduler = DDIMScheduler(
                prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, **SCHEDULE, **options
            )
        self.process = NoiseProcess.from_scheduler(self.scheduler)
        self.network = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        torch.nn.init.ones_(self.network.weight)
        self.shape = shape
        self._unconditional = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape that was asked for."""
        return self.shape

    @property
    def image_size(self) -> int:
        """There are no images."""
        raise NotImplementedError

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the best prediction of what the process asks for."""
        pairs = [level(self.scheduler, value) for value in t.tolist()]
        column = (-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = (torch.tensor(one, dtype=torch.float64).reshape(column) for one in zip(*pairs, strict=True))
        mean = (self.network.weight * cond.prompt_embeds.reshape(-1, 1)).reshape(column)
        clean, noise = posterior(x_t.double(), mean, alpha, sigma)
        outputs = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}
        return outputs.get(self.process.prediction, noise - clean)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Read the mean of each prompt from its text."""
        return Conditioning(torch.tensor([float(prompt or 0) for prompt in prompts]).double().reshape(-1, 1, 1))

    def _make_unconditional(self) -> Conditioning:
        return self.encode_prompts([""])

    def encode(self, media: Tensor) -> Tensor:
        """Media are latents."""
        return media

    def encode_posterior(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Media are latents."""
        return media, torch.zeros_like(media)

    def decode(self, latents: Tensor) -> Tensor:
        """Media are latents."""
        return latents
