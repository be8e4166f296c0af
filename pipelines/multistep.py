"""DPM-Solver++ of second order (arXiv 2211.01095, algorithm 2), for diffusion and for flow matching; deterministic.

Diffusion models are stepped by diffusers' scheduler. For flow matching the formula is that of DiffusionNFT's ``dpm2``
(NVlabs/DiffusionNFT, ``flow_grpo/diffusers_patch/solver.py``), on the family's own levels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.guidance import Predictor
from pipelines.noise import NoiseProcess, Schedule


@torch.no_grad()
def dpm_solver(
    process: NoiseProcess, scheduler: Any, predict: Predictor, x: Float[Tensor, "batch *latent"], schedule: Schedule
) -> tuple[Float[Tensor, "batch *latent"], Schedule]:
    """Return the clean latents that the solver samples from noise `x`, and the levels that it used.

    `scheduler` is the model's own of diffusers, for diffusion. Raises `PipelineError` for more steps than it has.
    """
    if process.prediction == "flow":
        return _flow(process, predict, x, schedule), schedule
    from diffusers import DPMSolverMultistepScheduler

    steps = len(schedule.levels)
    config = {key: value for key, value in scheduler.config.items() if key != "snr_shift_scale"}
    solver = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", **_shifted_betas(scheduler))
    solver.set_timesteps(steps)
    grid = solver.timesteps
    if len(grid.unique()) < len(grid):
        levels = process.num_train_timesteps
        raise PipelineError(f"solver 'dpm++' has no {steps} different steps on {levels} levels; take fewer.")
    on_device = grid.to(x.device)
    for index, t in enumerate(grid.tolist()):
        output = predict(x, on_device[index].expand(len(x)))
        x = solver.step(output, t, x, return_dict=False)[0]
    return x, Schedule(grid, torch.cat([grid[1:], grid.new_tensor([-1])]))


def _shifted_betas(scheduler: Any) -> dict[str, Any]:
    """Return the betas of a scheduler with a shifted signal-to-noise ratio (CogVideoX), which the solver knows not.

    The last level, pure noise, keeps a signal of ``2^-12``, as the solver's own zero-SNR option does.
    """
    if "snr_shift_scale" not in scheduler.config:
        return {}
    bars = scheduler.alphas_cumprod.double().clamp_min(2.0**-24)
    betas = 1.0 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
    return {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}


def _flow(process: NoiseProcess, predict: Predictor, x: Tensor, schedule: Schedule) -> Tensor:
    """Step along ``lambda = log((1 - sigma) / sigma)`` by predictions of the clean latents, first and last at order 1.

    With h the step in lambda, h1 the one before, and x0 and x0' the predictions at the step and before it::

        D = x0 + h / (2 h1) * (x0 - x0')
        x = sigma_next / sigma * x + (1 - sigma_next - sigma_next (1 - sigma) / sigma) * D

    At order 1, D is x0. It is after a step from sigma = 1 too, where lambda has no bound and h / h1 is 0.
    """
    on_device = schedule.levels.to(x.device)
    sigmas = [max(level, 0.0) / process.num_train_timesteps for level in schedule.levels.double().tolist()] + [0.0]
    logs = [_log_ratio(sigma) for sigma in sigmas]
    before: Tensor | None = None
    for index in range(len(on_device)):
        clean = process.clean(x, predict(x, on_device[index].expand(len(x))), schedule.levels[index].item())
        guess, sigma, sigma_next = clean, sigmas[index], sigmas[index + 1]
        if before is not None and index < len(on_device) - 1:
            ratio = (logs[index + 1] - logs[index]) / (logs[index] - logs[index - 1])
            guess = clean + ratio / 2.0 * (clean - before)
        x = sigma_next / sigma * x + (1.0 - sigma_next - sigma_next * (1.0 - sigma) / sigma) * guess
        before = clean
    return x


def _log_ratio(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log((1.0 - sigma) / sigma)
