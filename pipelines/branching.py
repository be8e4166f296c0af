"""Sample with several candidates at each random step, for step-by-step preferences.

Candidates are drawn from one Gaussian, whose mean takes one network call. They are judged by the clean image that the
network predicts from each, or by the noisy latents. The chain continues from the first. Since candidates are
independent draws, this equals continuing from a random one, and the network call that predicts its clean image is
shared with the next step.
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
from pipelines.kernels import Kernel
from pipelines.noise import Timestep
from pipelines.sampling import latent_dtype, noise_stream


@dataclass(frozen=True)
class Branching:
    """A random sampling step from level `t` to `t_next` by `kernel`: its start, and its candidate results.

    `clean` are the clean latents predicted from each candidate, None without `predict_clean`; `std` is that of
    the step, the same for all samples. A batch that mixes steps has levels and `std` for each sample.
    """

    t: Timestep
    t_next: Timestep
    kernel: Kernel
    std: float | Float[Tensor, " batch"]
    state: Float[Tensor, "batch *latent"]
    candidates: Float[Tensor, "candidates batch *latent"]
    clean: Float[Tensor, "candidates batch *latent"] | None

    def pick(self, *chosen: Int[Tensor, " batch"]) -> Branching:
        """Return the step with these candidates alone, each given by its index for every sample."""
        rows = torch.arange(len(self.state), device=self.state.device)
        index = torch.stack(chosen)
        clean = None if self.clean is None else self.clean[index, rows]
        return replace(self, candidates=self.candidates[index, rows], clean=clean)


@torch.no_grad()
def sample_branching(
    generator: Generator,
    cond: Conditioning,
    *,
    kernel: Kernel,
    steps: int,
    candidates: int,
    seeds: Sequence[int],
    visit: Callable[[Branching], None],
    predict_clean: bool = True,
    guidance: float = 7.5,
    autocast: Autocast = nullcontext,
) -> Float[Tensor, "batch *latent"]:
    """Sample latents by `kernel` in `steps` steps, and call `visit` with each random step.

    With one candidate the result is that of `pipelines.sample`, to the bit where batches of one size are computed.
    With `predict_clean` a random step costs `candidates` network calls for each sample; without, like a deterministic
    one, a single call. `guidance` and `autocast` are those of `guided_predictor`. Raises `PipelineError` for less than
    one candidate, and for a kernel that does not fit the model or the number of steps.
    """
    if candidates < 1:
        raise PipelineError(f"candidates must be at least 1, got {candidates}.")
    process, count, kernels = generator.process, len(seeds), kernel.for_steps(steps)
    predictors = {
        times: guided_predictor(generator, Conditioning.cat([cond] * times), guidance, autocast=autocast)
        for times in {1, candidates if predict_clean else 1}
    }
    noise, stds = noise_stream(seeds, generator.latent_shape, generator.device), kernel.stds(process, steps)
    grid, next_grid = process.schedule(steps)
    on_device, levels = grid.to(generator.device), grid.tolist()
    x = next(noise).to(latent_dtype(generator))
    output = predictors[1](x, on_device[0].expand(count))
    for index, (t, t_next) in enumerate(zip(levels, next_grid.tolist(), strict=True)):
        mean, std = kernels[index](process, x, output, t, t_next)
        times = candidates if stds[index] else 1
        drawn = clean = torch.stack([mean + std * z for z in itertools.islice(noise, times)])
        if index + 1 < steps:
            looked_at = drawn if predict_clean else drawn[:1]
            flat = looked_at.flatten(0, 1)
            outputs = predictors[len(looked_at)](flat, on_device[index + 1].expand(len(flat)))
            clean = process.clean(flat, outputs, levels[index + 1]).view_as(looked_at)
            output = outputs[:count]
        if stds[index]:
            visit(Branching(t, t_next, kernels[index], stds[index], x, drawn, clean if predict_clean else None))
        x = drawn[0]
    return x
