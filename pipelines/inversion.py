"""DDIM inversion (arXiv 2010.02502) with ReNoise (arXiv 2403.14602): noisy latents that lead to given clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError, choose
from pipelines.generator import Generator
from pipelines.guidance import Autocast, guided_predictor
from pipelines.kernels import ddim
from pipelines.noise import NoiseProcess
from pipelines.sampling import latent_dtype, noise_stream

GRIDS = ("exact", "floor")
STARTS = ("sampler", "clean")


def inversion_grid(
    process: NoiseProcess, steps: int, t: int | Tensor | None = None, grid: Literal["exact", "floor"] = "exact"
) -> tuple[Tensor, Tensor]:
    """Return the ascending start and end levels of the steps of `invert`, each ``[steps]`` or ``[steps, batch]``.

    Without `t` this is the sampler's own grid turned round. With `t` the levels are spread evenly from clean (-1) and
    end exactly at `t`; with a tensor of timesteps each sample has its own grid. With ``grid="floor"`` they are those
    of the sampler's grid below `t`, and stay at the last of them.
    """
    if t is None:
        levels, next_levels = process.schedule(steps)
        return next_levels.flip(0), levels.flip(0)
    if steps < 1:
        raise PipelineError(f"steps must be at least 1, got {steps}.")
    end = torch.as_tensor(t).double().cpu()
    if bool((end < 0).any()) or bool((end >= process.num_train_timesteps + (process.prediction == "flow")).any()):
        raise PipelineError(f"t must lie in 0..{process.num_train_timesteps - 1}, got {t}.")
    if choose("grid", grid, GRIDS) == "floor":
        sources, targets = (levels.reshape(-1, *[1] * end.ndim) for levels in inversion_grid(process, steps))
        floor = torch.where(targets < end, targets, -1).amax(0)
        return torch.minimum(sources, floor), torch.minimum(targets, floor)
    fraction = (torch.arange(steps + 1, dtype=torch.float64) / steps).reshape(-1, *[1] * end.ndim)
    if process.prediction == "flow":
        levels = end * fraction
    else:
        levels = ((end + 1.0) * fraction - 1.0).round().long()
    return levels[:-1], levels[1:]


def invert(
    generator: Generator,
    cond: Conditioning,
    latents: Float[Tensor, "batch *latent"],
    *,
    t: int | Shaped[Tensor, " batch"] | None = None,
    steps: int = 50,
    renoise: int = 0,
    guidance: float = 1.0,
    negative: Conditioning | None = None,
    grid: Literal["exact", "floor"] = "exact",
    start: Literal["sampler", "clean"] = "sampler",
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    autocast: Autocast = nullcontext,
) -> Float[Tensor, "batch *latent"]:
    """Return the noisy latents at `t` from which deterministic DDIM leads back to `latents` (no gradients).

    DDIM inversion (arXiv 2010.02502): each step assumes that the noise predicted at its end point is the one predicted
    at its start, so the error falls as `steps` grow. `renoise` repeats a step that often with the mean of the
    predictions at its start and at its successive end points, all at the target timestep (ReNoise, arXiv 2403.14602;
    ``renoise=1`` is what SmPO does). The last level is exactly `t` (default: the top of the sampler's grid), or with
    ``grid="floor"`` the sampler's highest below `t`, as in the published codes of SmPO and InPO with diffusers from
    0.22 on (before that, the scheduler they use led to the level above).

    `start` says how noisy `latents` are. "sampler": as noisy as what the sampler ends with, which leads back to them
    exactly. With a scheduler whose last level is its first timestep (``set_alpha_to_one`` off, as for Stable
    Diffusion) that is not clean, so that images of a data set are given too little noise: 0.29 of what belongs to
    timestep 1 of Stable Diffusion, 0.79 at 20, 0.95 at 200. "clean": they are clean, and the first step starts there.

    `eta` adds to each step that many times the noise that the sampler's step back would add, drawn from `seeds`, one
    a sample. `guidance`, `negative` and `autocast` are those of `guided_predictor`. Raises `PipelineError` for a `t`
    outside of the schedule, and for prompts or seeds that are not one for each of the latents.
    """
    if renoise < 0:
        raise PipelineError(f"renoise must be 0 or more, got {renoise}.")
    clean = choose("start", start, STARTS) == "clean"
    if len(latents) != len(cond):
        raise PipelineError(f"invert got {len(latents)} latents but {len(cond)} prompts.")
    if eta and (seeds is None or len(seeds) != len(latents)):
        raise PipelineError(f"invert with eta {eta} needs seeds, one integer a sample.")
    process, back = generator.process, ddim(eta)
    sources, targets = inversion_grid(process, steps, t, grid)
    predict = guided_predictor(generator, cond, guidance, negative, autocast=autocast)
    x = latents.to(generator.device, latent_dtype(generator))
    draws = noise_stream(seeds, latents.shape[1:], x.device) if eta and seeds is not None else None
    sources, targets = (levels.to(x.device).reshape(steps, -1).expand(-1, len(x)) for levels in (sources, targets))
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            guess, total, seen = x, torch.zeros_like(x), target.clamp_min(0)
            for repeat in range(renoise + 1):
                total = total + process.to_noise(guess, predict(guess, seen), target)
                noise = total / (repeat + 1)
                guess = process.forward_step(x, noise, source, target)
                if clean:
                    guess = torch.where(_like(source, x) < 0, process.add_noise(x, noise, target), guess)
            if draws is not None:
                guess = guess + back(process, guess, total, target, source)[1] * next(draws)
            x = torch.where(_like(target > source, x), guess, x)
    return x


def _like(values: Shaped[Tensor, " batch"], x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))
