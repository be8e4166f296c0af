"""Numbers of recorded sampling steps: their durations, and the weights that publications give to their losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses import flash_weights, temp_weights
from pipelines import Kernel, Schedule
from pipelines.noise import NoiseProcess
from pipelines.sampling import Trajectory

Step = tuple[Kernel, float, float]
"""A kernel, the level that its step starts from, and the one that it leads to."""
TIMED = ("flow_sde", "dance", "wan_sde")
"""Kernels whose std is s sqrt(duration), s being what Flow-GRPO's code divides its KL by."""


def recorded_steps(trajectory: Trajectory) -> list[Step]:
    """Return the recorded steps."""
    levels = zip(trajectory.timesteps.tolist(), trajectory.next_timesteps.tolist(), strict=True)
    return [(kernel, *pair) for kernel, pair in zip(trajectory.kernels, levels, strict=True)]


def steps_of(process: NoiseProcess, kernel: Kernel, schedule: int | Schedule, chosen: Iterable[int]) -> list[Step]:
    """Return some steps of a sampling."""
    levels, after = process.schedule(schedule) if isinstance(schedule, int) else schedule
    kernels = kernel.for_steps(len(levels))
    return [(kernels[index], levels[index].item(), after[index].item()) for index in chosen]


def durations(process: NoiseProcess, steps: Sequence[Step]) -> Float[Tensor, " steps"]:
    """Return how much the noise level sigma falls in each step, |dt|."""
    like = torch.zeros(1, dtype=torch.float64)
    falls = [process.coefficients(t, like)[1] - process.coefficients(after, like)[1] for _, t, after in steps]
    return torch.cat([fall.flatten() for fall in falls])


def slopes_and_stds(
    process: NoiseProcess, steps: Sequence[Step]
) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Return |d mean / d output| of each step and its standard deviation."""
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    small = torch.full_like(nothing, 1e-3)  # the mean is linear in the output, where the clean latents are not clipped
    found = [(kernel(process, nothing, small, t, after), t, after) for kernel, t, after in steps]
    return (
        torch.stack([(mean / small).abs().flatten()[0] for (mean, _), _, _ in found]),
        torch.stack([std.flatten()[0] for (_, std), _, _ in found]),
    )


def step_weights(
    kind: str, process: NoiseProcess, steps: Sequence[Step], pool: Sequence[Step]
) -> Float[Tensor, " steps"]:
    """Return the weight of the loss of each step; `pool` are the steps that might have been drawn, for "flash"."""
    if kind == "none":
        return torch.ones(len(steps), dtype=torch.float64)
    if kind == "guard":
        return 1.0 / durations(process, steps)
    slopes, stds = slopes_and_stds(process, steps)
    if kind == "temp":
        return temp_weights(stds)
    pool_slopes, pool_stds = slopes_and_stds(process, pool)
    return flash_weights(stds, slopes, pool_stds / pool_slopes)


def kl_units(form: str, process: NoiseProcess, steps: Sequence[Step]) -> list[float]:
    """Return what the KL of each step is multiplied by.

    "code" is what Flow-GRPO's code computes, which leaves the duration out of the variance (and with the kernel cps
    does not); "x" is the squared difference of the means.
    """
    stds = slopes_and_stds(process, steps)[1]
    if form == "x":
        return (2.0 * stds.square()).tolist()
    each = zip(steps, durations(process, steps).tolist(), strict=True)
    return [duration if form == "code" and kernel.name in TIMED else 1.0 for (kernel, _, _), duration in each]
