"""SDEdit (arXiv 2108.01073): samples that start from given latents, noised to a level of the sampling grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.generator import Generator
from pipelines.noise import NoiseProcess, Schedule
from pipelines.sampling import Segment, Trajectory, latent_dtype, sample, seeded_noise

ROUNDING = 1e-6
"""A level this little above a strength counts as at it: grids of flow models are float32."""


def start_step(process: NoiseProcess, schedule: Schedule, strength: float) -> int:
    """Return the step of a grid that starts at the highest level at or below `strength`.

    The level of timestep t of T is ``(t + 1) / T`` in diffusion and ``t / T``, which is sigma, in flow matching: 0 is
    clean, 1 the noisiest. The number of steps comes back where every level is above. diffusers counts steps instead:
    the last ``int(steps * strength)`` run. That is the same on an evenly spaced grid where ``steps * strength`` is
    whole; on a shifted one its strength is a higher level. Raises `PipelineError` for a strength outside of 0..1.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    >>> grid = process.schedule(4, sigmas=[1.0, 0.75, 0.5, 0.25])  # levels 1, 0.9, 0.75 and 0.5
    >>> [start_step(process, grid, strength) for strength in (1.0, 0.75, 0.7, 0.3)]
    [0, 2, 3, 4]
    """
    if not 0 <= strength <= 1:
        raise PipelineError(f"strength must lie in 0..1 (0 the given latents, 1 pure noise), got {strength}.")
    clean = 0.0 if process.prediction == "flow" else -1.0
    shares = (schedule.levels.double() - clean) / process.num_train_timesteps
    return int((shares > strength + ROUNDING).sum())


def sdedit(
    generator: Generator,
    cond: Conditioning,
    clean: Float[Tensor, "batch *latent"],
    *,
    strength: float,
    seeds: Sequence[int],
    steps: int | Schedule = 50,
    **options: Any,
) -> Trajectory:
    """Sample from `clean` latents, one for each prompt, noised to the level of `start_step` by the seeds' noise.

    What is coarse, such as the motion of a video, stays as given; what is fine is the model's. The noise is what
    `sample` begins with, and `options` are those of `sample`. Without a level at or below `strength` no step runs and
    the latents come back as they are. With strength 1 they do not count: the result is that of `sample`, where
    adding noise at a highest level that is not pure noise would leave a trace of them.

    >>> import torch
    >>> from pipelines import load_generator
    >>> generator = load_generator("assets/shapes-sd")
    >>> cond = generator.encode_prompts(["a red circle", "a red circle"])
    >>> real = generator.encode(torch.rand(1, 3, 64, 64)).expand(2, -1, -1, -1)
    >>> sdedit(generator, cond, real, strength=0.7, seeds=[1, 2], steps=10, guidance=3.0).latents.shape[0]
    2
    """
    if len(clean) != len(cond):
        raise PipelineError(f"sdedit got {len(clean)} latents but {len(cond)} prompts.")
    schedule = steps if isinstance(steps, Schedule) else generator.schedule(steps, clean.shape[1:])
    start = start_step(generator.process, schedule, strength)
    if strength == 1:
        return sample(generator, cond, steps=steps, seeds=seeds, **options)
    clean = clean.to(generator.device, latent_dtype(generator))
    if start == len(schedule.levels):
        return Trajectory(clean, schedule.levels[:0], schedule.next_levels[:0])
    noise = seeded_noise(seeds, clean.shape[1:], device=clean.device)
    noised = generator.process.add_noise(clean, noise, schedule.levels[start].item())
    return sample(
        generator, cond, steps=schedule, seeds=seeds, latents=noised, segment=Segment(start=start), **options
    )
