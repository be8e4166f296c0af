"""The optimiser step of the public Diffusion-DPO scripts, written from its description; none of their code is here.

In the manner of the scripts around arXiv 2311.12908: images are encoded by the VAE and prompts by the text encoder at
every step, a frozen second network is the reference, chosen and rejected are stacked in one batch, and what is frozen
is kept in the compute precision. Images are decoded and prompts tokenised beforehand, as the data loader would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.methods.run import Run


def recipe_step(
    run: Run,
    pipe: Any,
    pixels: Tensor,
    captions: list[str],
    *,
    dtype: torch.dtype,
    beta: float,
    learning_rate: float,
    max_grad_norm: float,
) -> Callable[[], None]:
    """Return one step as a function; `pixels` [2B, 3, H, W] in [-1, 1] hold the chosen images, then the rejected.

    Of `run` only the network that is made trainable and the autocast are used; the frozen parts are those of `pipe`,
    a diffusers pipeline, which is changed.
    """
    network, batch = run.generator.network, len(captions)
    reference, vae, text_encoder = (part.to(dtype).eval() for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    scheduler, pixels = pipe.scheduler, pixels.to(pipe.device)
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = tokens.to(pipe.device)
    parameters = run.generator.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels.to(dtype)).latents.float() * vae.config.scaling_factor
            states = text_encoder(tokens)[0].repeat(2, 1, 1)
        noise = torch.randn_like(latents[:batch]).repeat(2, 1, 1, 1)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=pixels.device).repeat(2)
        noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
        with run.autocast():
            output = network(noisy, t, states).sample.float()
        with torch.no_grad():
            frozen = reference(noisy.to(dtype), t, states).sample.float()
        margin = _gap(output, target) - _gap(frozen, target)
        F.logsigmoid(-0.5 * beta * margin).mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gap(output: Tensor, target: Tensor) -> Tensor:
    """Error of the chosen image less that of the rejected one, a pair."""
    chosen, rejected = (output - target).square().mean((1, 2, 3)).chunk(2)
    return chosen - rejected
