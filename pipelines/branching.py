"""Sample with several candidates at chosen random steps, for step-by-step preferences.

Candidates are drawn from one Gaussian, whose mean takes one network call. They are judged by the clean image that the
network predicts from each, or by the noisy latents; at once, or after a segment of further steps that each takes by
itself. The chain continues from the first. Since candidates are independent draws, this equals continuing from a
random one, and the network call that predicts its clean image is shared with the next step.
"""

from __future__ import annotations

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
from pipelines.noise import NoiseProcess, Timestep
from pipelines.sampling import latent_dtype, noise_stream


@dataclass(frozen=True)
class Branching:
    """A random sampling step from level `t` to `t_next` by `kernel`: its start, and its candidate results.

    `states` are what the step starts from: one for all candidates where they branch, and one for each at the further
    steps of a segment. `clean` are the clean latents predicted from each candidate, None without `predict_clean` and
    before the end of a segment; `std` is that of the step, the same for all samples. A batch that mixes steps has
    levels and `std` for each sample.
    """

    t: Timestep
    t_next: Timestep
    kernel: Kernel
    std: float | Float[Tensor, " batch"]
    states: Float[Tensor, "starts batch *latent"]
    candidates: Float[Tensor, "candidates batch *latent"]
    clean: Float[Tensor, "candidates batch *latent"] | None

    @property
    def state(self) -> Float[Tensor, "batch *latent"]:
        """What the first candidate starts from: where they branch, all of them."""
        return self.states[0]

    def pick(self, *chosen: Int[Tensor, " batch"]) -> Branching:
        """Return the step with these candidates alone, each given by its index for every sample."""
        rows = torch.arange(self.candidates.shape[1], device=self.candidates.device)
        index = torch.stack(chosen)
        states = self.states if len(self.states) == 1 else self.states[index, rows]
        clean = None if self.clean is None else self.clean[index, rows]
        return replace(self, states=states, candidates=self.candidates[index, rows], clean=clean)


def segments(steps: Sequence[int], extra: int) -> list[list[int]]:
    """Cut ascending step numbers into segments of ``1 + extra`` steps, or fewer where the numbers end or leave a gap.

    >>> segments([4, 5, 6, 7, 8, 9], 3), segments([0, 2, 3], 1)
    ([[4, 5, 6, 7], [8, 9]], [[0], [2, 3]])
    """
    found: list[list[int]] = []
    for step in steps:
        if found and len(found[-1]) <= extra and step == found[-1][-1] + 1:
            found[-1].append(step)
        else:
            found.append([step])
    return found


@torch.no_grad()
def sample_branching(
    generator: Generator,
    cond: Conditioning,
    *,
    kernel: Kernel,
    steps: int,
    candidates: int,
    seeds: Sequence[int],
    visit: Callable[[list[Branching]], None],
    branch_steps: Sequence[int] | None = None,
    segment: int = 0,
    predict_clean: bool = True,
    guidance: float = 7.5,
    autocast: Autocast = nullcontext,
) -> Float[Tensor, "batch *latent"]:
    """Sample latents by `kernel` in `steps` steps, and call `visit` with the steps of each segment of candidates.

    Candidates branch at the random ones of `branch_steps` (None: all) and take `segment` further ones of these each
    before they are handed over; the next segment begins after them. `visit` gets the steps of a segment; the last
    holds the candidates to be compared. Other random steps are drawn once, and end a segment early.

    With one candidate the result is that of `pipelines.sample`, to the bit where batches of one size are computed.
    A call of the network for every candidate is made at each step of a segment but the first, and, with
    `predict_clean`, at its end; one call for the batch elsewhere. `guidance` and `autocast` are those of
    `guided_predictor`. Raises `PipelineError` for less than one candidate, a negative `segment`, and a kernel that
    does not fit the model or the number of steps.
    """
    if candidates < 1 or segment < 0:
        raise PipelineError(f"candidates must be at least 1 and segment 0, got {candidates} and {segment}.")
    process, count, kernels = generator.process, len(seeds), kernel.for_steps(steps)
    noise, stds = noise_stream(seeds, generator.latent_shape, generator.device), kernel.stds(process, steps)
    random = [index for index in (range(steps) if branch_steps is None else branch_steps) if stds[index]]
    inside = {index: run for run in segments(random, segment) for index in run}
    predictors = {
        times: guided_predictor(generator, Conditioning.cat([cond] * times), guidance, autocast=autocast)
        for times in {1, candidates if predict_clean or segment else 1}
    }
    grid, next_grid = process.schedule(steps)
    on_device, levels = grid.to(generator.device), grid.tolist()
    x = next(noise).to(latent_dtype(generator)).unsqueeze(0)
    output = predictors[1](x[0], on_device[0].expand(count)).unsqueeze(0)
    seen: list[Branching] = []
    for index, (t, t_next) in enumerate(zip(levels, next_grid.tolist(), strict=True)):
        run = inside.get(index, [index])
        ends, times = index == run[-1], candidates if index in inside else 1
        means, std = _each(kernels[index], process, x, output, t, t_next)
        drawn = means.expand(times, *means.shape[1:])
        drawn = clean = torch.stack([mean + std * z for mean, z in zip(drawn, noise, strict=False)])
        if index + 1 < steps:
            looked_at = drawn if predict_clean or not ends else drawn[:1]
            flat = looked_at.flatten(0, 1)
            output = predictors[len(looked_at)](flat, on_device[index + 1].expand(len(flat))).view_as(looked_at)
            clean = process.clean(flat, output.flatten(0, 1), levels[index + 1]).view_as(looked_at)
        if index in inside:
            seen.append(Branching(t, t_next, kernels[index], stds[index], x, drawn, None))
        x = drawn
        if ends:
            if seen:
                visit([*seen[:-1], replace(seen[-1], clean=clean)] if predict_clean else seen)
            x, output, seen = x[:1], output[:1], []
    return x[0]


def _each(
    kernel: Kernel, process: NoiseProcess, x: Tensor, output: Tensor, t: Timestep, t_next: Timestep
) -> tuple[Tensor, Tensor]:
    """Return the mean of the step of every chain, and the deviation that they share."""
    steps = [kernel(process, one, prediction, t, t_next) for one, prediction in zip(x, output, strict=True)]
    return torch.stack([mean for mean, _ in steps]), steps[0][1]
