"""CogVideoX's noise process: the signal-to-noise ratio is shifted, then the last level is made pure noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from pipelines import NoiseProcess, ddim
from pipelines.multistep import dpm_solver

PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def signal(shift: float) -> np.ndarray:
    """Return alpha of every level by the paper's steps (arXiv 2408.06072; 2305.08891, algorithm 1), float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars = np.cumprod(1 - betas)
    ratio = bars / (1 - bars) / shift  # the signal-to-noise ratio, divided by the shift
    root = np.sqrt(ratio / (1 + ratio))
    return (root - root[-1]) * root[0] / (root[0] - root[-1])


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_are_shifted_before_the_last_is_made_pure_noise(kind: type, shift: float) -> None:
    process = NoiseProcess.from_scheduler(kind(**PUBLISHED, snr_shift_scale=shift))
    assert process.prediction == "v_prediction" and process.clip_range is None
    alpha, levels = process.alpha(torch.arange(1000)), torch.from_numpy(signal(shift)).float()
    torch.testing.assert_close(alpha, levels, rtol=1e-5, atol=1e-6)
    assert process.alpha(999).item() == 0.0 and process.sigma(999).item() == 1.0
    assert process.alpha(-1).item() == 1.0
    assert process.timesteps(50)[:2].tolist() == [999, 979] and process.timesteps(50)[-1] == 19


def test_the_official_loss_is_that_of_the_velocity() -> None:
    """The published code weights the error of x0 by 1 / (1 - alpha^2); that is the error of v."""
    scheduler = CogVideoXDPMScheduler(**PUBLISHED, snr_shift_scale=1.0)
    process = NoiseProcess.from_scheduler(scheduler)
    draw = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(3, 3, 4, 2, 2, generator=draw, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([10, 600, 998])
    x_t = process.add_noise(x0, noise, t)
    predicted = scheduler.get_velocity(output, x_t, t)  # the code's way to x0
    weight = 1 / (1 - scheduler.alphas_cumprod[t])
    official = (weight.reshape(-1, 1, 1, 1, 1) * (predicted - x0).square()).flatten(1).mean(1)
    ours = (output - process.target(x0, noise, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, official, rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [999, 499, 19])
def test_a_step_is_that_of_the_scheduler(t: int) -> None:
    scheduler = CogVideoXDDIMScheduler(**PUBLISHED)
    process = NoiseProcess.from_scheduler(scheduler)
    scheduler.set_timesteps(50)
    x, output = torch.randn(2, 2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = ddim(0.0)(process, x, output, t, max(t - 20, -1))
    torch.testing.assert_close(mean, scheduler.step(output, t, x).prev_sample, rtol=1e-5, atol=1e-5)
    assert not std.any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_solver_knows_the_shift(shift: float) -> None:
    """Of data that are always 0.5, any solver's x0 is 0.5 at every step, if its levels are truly the process's."""
    scheduler = CogVideoXDPMScheduler(**PUBLISHED, snr_shift_scale=shift)
    process = NoiseProcess.from_scheduler(scheduler)
    x = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    errors = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.coefficients(t, x)
        noise = (x - alpha * 0.5) / sigma
        errors.append(float(noise.std()) - 1)
        return alpha * noise - sigma * 0.5

    clean, used = dpm_solver(process, scheduler, velocity, x, process.schedule(20))
    assert used.levels[0] == 999
    torch.testing.assert_close(clean, torch.full_like(x, 0.5), rtol=0, atol=1e-3)
    assert max(errors) - min(errors) < 0.01  # the noise keeps its size, so the levels stepped to are those told
