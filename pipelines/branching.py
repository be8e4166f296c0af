"""Sample with several candidates at each random step: what step-by-step preferences are made from.

Candidates are drawn from one Gaussian, whose mean the network gives once; what tells them apart is the clean image
that the network predicts from each, or whatever can be read from noisy latents. The chain goes on from the first.
They are independent draws, so to whoever judges them this is going on from a random one, and the network call that
predicts its clean image is the next step's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.generator import Generator
from pipelines.guidance import Autocast, guided_predictor
from pipelines.noise import NoiseProcess
from pipelines.sampling import noise_stream


@dataclass(frozen=True)
class Branching:
    """A random sampling step from level `t` to `t_next`: where it started, and what could have come of it.

    `clean` are the clean latents predicted from each candidate, None where they were not asked for; `std` is that of
    the step, the same for all samples.
    """

    t: int | float
    t_next: int | float
    eta: float
    std: float
    state: Float[Tensor, "batch *latent"]
    candidates: Float[Tensor, "candidates batch *latent"]
    clean: Float[Tensor, "candidates batch *latent"] | None

    def pick(self, *chosen: Int[Tensor, " batch"]) -> Branching:
        """Return the step with these candidates alone, each given by its index for every sample."""
        rows = torch.arange(len(self.state), device=self.state.device)
        index = torch.stack(chosen)
        clean = None if self.clean is None else self.clean[index, rows]
        return replace(self, candidates=self.candidates[index, rows], clean=clean)


def step_stds(process: NoiseProcess, etas: Sequence[float]) -> list[float]:
    """Return the standard deviation of each step of the sampling grid with as many steps as there are etas."""
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    grid, next_grid = process.schedule(len(etas))
    levels = zip(grid.tolist(), next_grid.tolist(), etas, strict=True)
    return [float(process.reverse_step(nothing, nothing, t, t_next, eta)[1]) for t, t_next, eta in levels]


@torch.no_grad()
def sample_branching(
    generator: Generator,
    cond: Conditioning,
    *,
    etas: Sequence[float],
    candidates: int,
    seeds: Sequence[int],
    visit: Callable[[Branching], None],
    predict_clean: bool = True,
    guidance: float = 7.5,
    autocast: Autocast = nullcontext,
) -> Float[Tensor, "batch *latent"]:
    """Sample latents by eta-DDIM, `etas` being the noise of each step, and show each random step to `visit`.

    With one candidate the result is that of `pipelines.sample`, to the bit where batches of one size are computed.
    With `predict_clean` a random step costs `candidates` network calls for each sample; without, like a deterministic
    one, a single call.
    """
    if candidates < 1:
        raise PipelineError(f"candidates must be at least 1, got {candidates}.")
    process, count, steps = generator.process, len(seeds), len(etas)
    predictors = {
        times: guided_predictor(generator, Conditioning.cat([cond] * times), guidance, autocast=autocast)
        for times in {1, candidates if predict_clean else 1}
    }
    noise, stds = noise_stream(seeds, generator.latent_shape, generator.device), step_stds(process, etas)
    grid, next_grid = process.schedule(steps)
    on_device, levels = grid.to(generator.device), grid.tolist()
    x = next(noise).to(torch.float64 if generator.dtype == torch.float64 else torch.float32)
    output = predictors[1](x, on_device[0].expand(count))
    for index, (t, t_next) in enumerate(zip(levels, next_grid.tolist(), strict=True)):
        mean, std = process.reverse_step(x, output, t, t_next, etas[index])
        times = candidates if stds[index] else 1
        drawn = clean = torch.stack([mean + std * z for z in itertools.islice(noise, times)])
        if index + 1 < steps:
            looked_at = drawn if predict_clean else drawn[:1]
            flat = looked_at.flatten(0, 1)
            outputs = predictors[len(looked_at)](flat, on_device[index + 1].expand(len(flat)))
            clean = process.clean(flat, outputs, levels[index + 1]).view_as(looked_at)
            output = outputs[:count]
        if stds[index]:
            visit(Branching(t, t_next, etas[index], stds[index], x, drawn, clean if predict_clean else None))
        x = drawn[0]
    return x
