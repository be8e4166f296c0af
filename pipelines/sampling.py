"""Samplers as pure functions: eta-DDIM with recording and gradients, DPM-Solver++, DDIM inversion.

eta-DDIM: arXiv 2010.02502; DPM-Solver++: arXiv 2211.01095 (diffusers' scheduler, inference only); ReNoise inversion:
arXiv 2403.14602. How a gradient through the sampler is cut short: `pipelines.gradient_sampling`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError, choose
from pipelines.generator import Generator
from pipelines.guidance import Autocast, Predictor, guided_predictor
from pipelines.noise import NoiseProcess

SOLVERS = ("ddim", "dpm++")
GRIDS = ("exact", "floor")


@dataclass
class Trajectory:
    """What sampling returned; all tensors are float32 (float64 if the network is).

    latents
        The clean latents, ``[batch, *latent]``.
    timesteps, next_timesteps
        The level each step started from and led to (-1 at the end), ``[steps]``, on the CPU.
    states, means, stds, log_probs
        With ``record``: ``states[i]`` is x before step i and ``states[steps]`` the latents; ``means[i]`` and
        ``stds[i]`` are the Gaussian that ``states[i + 1]`` was drawn from; ``log_probs[i]`` is its log-density there,
        the MEAN over latent dimensions (nats). Shapes ``[steps + 1, batch, ...]``, ``[steps, batch, ...]`` and
        ``[steps, batch]`` twice. Means and log-probs of the steps in ``grad_steps`` carry gradients, states never do.
    """

    latents: Float[Tensor, "batch *latent"]
    timesteps: Shaped[Tensor, " steps"]
    next_timesteps: Shaped[Tensor, " steps"]
    states: Float[Tensor, "states batch *latent"] | None = None
    means: Float[Tensor, "steps batch *latent"] | None = None
    stds: Float[Tensor, "steps batch"] | None = None
    log_probs: Float[Tensor, "steps batch"] | None = None

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join trajectories over the same timesteps along the batch."""
        first = parts[0]
        joined: dict[str, Tensor] = {}
        for name in ("states", "means", "stds", "log_probs"):
            if getattr(first, name) is not None:
                joined[name] = torch.cat([getattr(part, name) for part in parts], dim=1)
        return Trajectory(torch.cat([part.latents for part in parts]), first.timesteps, first.next_timesteps, **joined)


def gaussian_log_prob(
    sample: Float[Tensor, "batch *dims"], mean: Float[Tensor, "batch *dims"], std: Float[Tensor, " ..."]
) -> Float[Tensor, " batch"]:
    """Return the Gaussian log-density of `sample`, the MEAN over latent dimensions, in nats.

    ``mean_D[-(x - mu)^2 / (2 std^2) - log std - log(2 pi) / 2]`` as in DDPO (arXiv 2305.13301) and its successors; the
    true log-probability is D times this. `std` is ``[batch]`` or broadcasts. Where ``std = 0`` the step is
    deterministic and has no density: the result is 0 there, so that a ratio of two policies is 1.
    """
    if std.ndim == 1:
        std = std.reshape(-1, *[1] * (mean.ndim - 1))
    random = std > 0
    safe = torch.where(random, std, torch.ones_like(std))
    density = -(sample - mean).square() / (2.0 * safe.square()) - safe.log() - 0.5 * math.log(2.0 * math.pi)
    return torch.where(random, density, torch.zeros_like(density)).flatten(1).mean(1)


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str | None = None
) -> Float[Tensor, "batch ..."]:
    """Return standard normal noise ``[len(seeds), *shape]``, each row drawn from its own seed.

    Drawn on the CPU, one generator a sample, so a row depends on its seed alone: not on batch size, neighbours or
    device. The same numbers as diffusers' pipelines get from ``generator=[torch.Generator().manual_seed(s), ...]``.
    """
    return next(noise_stream(seeds, shape, device))


def noise_stream(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """Yield the initial noise and then one draw a step, each row from its own generator."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    target = torch.device(device or "cpu")
    buffer = torch.empty(len(seeds), *shape)
    while True:
        for row, generator in zip(buffer, generators, strict=True):
            torch.randn(*shape, generator=generator, out=row)
        # A fresh pinned copy lets the transfer overlap with the device's work; the buffer itself is refilled.
        yield buffer.pin_memory().to(target, non_blocking=True) if target.type == "cuda" else buffer.clone().to(target)


def sample(
    generator: Generator,
    cond: Conditioning,
    *,
    steps: int = 50,
    guidance: float = 7.5,
    eta: float | Sequence[float] = 0.0,
    seeds: Sequence[int] | None = None,
    solver: str = "ddim",
    negative: Conditioning | None = None,
    latents: Float[Tensor, "batch *latent"] | None = None,
    start_step: int = 0,
    exit_step: int | None = None,
    record: bool = False,
    grad_steps: Collection[int] = (),
    checkpoint: bool = False,
    autocast: Autocast = nullcontext,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Sample latents for a batch of prompts; decode them with ``generator.decode(trajectory.latents)``.

    With ``eta=0`` the result is that of diffusers' own pipeline with `DDIMScheduler`; `eta` may be a number for each
    step. Each sample depends on its seed and prompt alone. `latents` replaces the initial noise; seeds are then needed
    for ``eta > 0`` only. `start_step` begins at a later step of the grid, at whose level `latents` are; `exit_step`
    ends at an earlier one with the clean latents that its prediction implies (`NoiseProcess.clean`). `record` keeps
    states and per-step log-probabilities.

    `grad_steps` are the step indices whose network call keeps its graph; the predictions of other steps are constants,
    while the linear path from step to step carries the gradient on from the first of them. Nothing before it has a
    graph, and without `grad_steps` nothing at all. `checkpoint` and `autocast` are those of `guided_predictor`.
    ``solver="dpm++"`` is for inference only. `batch_size` splits the work; `progress` is called with the number of
    samples finished after each part.
    """
    etas = (float(eta),) * steps if isinstance(eta, int | float) else tuple(eta)
    plan = _Plan(steps, etas, start_step, exit_step, record, frozenset(grad_steps))
    plan.check(generator, choose("solver", solver, SOLVERS), begins=latents is not None)
    _check_batch(generator, cond, any(etas), seeds, latents, batch_size)
    parts = []
    for start in range(0, len(cond), batch_size or len(cond)):
        part = slice(start, start + (batch_size or len(cond)))
        shape = generator.latent_shape if latents is None else latents.shape[1:]
        # The initial draw is taken even when latents are given, so that the noise of later steps is the same.
        noise = None if seeds is None else noise_stream(seeds[part], shape, generator.device)
        drawn = None if noise is None else next(noise)
        x = drawn if latents is None else latents[part]
        assert x is not None
        x = x.to(generator.device, _precision(generator))
        against = negative if negative is None or len(negative) == 1 else negative[part]
        predict = guided_predictor(generator, cond[part], guidance, against, autocast=autocast, checkpoint=checkpoint)
        if solver == "dpm++":
            parts.append(_dpm_solver(generator, predict, x, steps))
        else:
            parts.append(_ddim(generator.process, predict, x, noise if any(etas) else None, plan))
        if progress is not None:
            progress(len(x))
    return parts[0] if len(parts) == 1 else Trajectory.cat(parts)


@dataclass(frozen=True)
class _Plan:
    """The steps of a grid of `steps` that run, from `start_step` to `exit_step` or the end, and what is kept."""

    steps: int
    etas: tuple[float, ...]
    start_step: int
    exit_step: int | None
    record: bool
    grad_steps: frozenset[int]

    @property
    def span(self) -> range:
        return range(self.start_step, self.steps if self.exit_step is None else self.exit_step + 1)

    def check(self, generator: Generator, solver: str, *, begins: bool) -> None:
        """Raise `PipelineError` unless `solver` can go through it; `begins` says that latents to begin with exist."""
        generator.process.check_steps(self.steps)
        if len(self.etas) != self.steps:
            raise PipelineError(
                f"eta must be one number, or one for each of {self.steps} steps; got {len(self.etas)}."
            )
        wrong = [eta for eta in self.etas if not 0.0 <= eta <= 1.0]
        if wrong:
            raise PipelineError(f"eta must lie in 0..1 (0 deterministic DDIM, 1 ancestral), got {wrong[0]}.")
        for name, index in (("start_step", self.start_step), ("exit_step", self.exit_step)):
            if index is not None and not 0 <= index < self.steps:
                raise PipelineError(f"{name} must lie in 0..{self.steps - 1} for {self.steps} steps, got {index}.")
        if not self.span:
            raise PipelineError(f"exit_step {self.exit_step} comes before start_step {self.start_step}; swap them.")
        if self.start_step and not begins:
            raise PipelineError(f"start_step {self.start_step} needs latents at the level of that step; give latents.")
        outside = sorted(index for index in self.grad_steps if index not in self.span)
        if outside:
            allowed = f"{self.span[0]}..{self.span[-1]}"
            raise PipelineError(f"grad_steps must lie in {allowed} for {self.steps} steps, got {outside}.")
        partial = self.start_step or self.exit_step is not None
        if solver == "dpm++" and (any(self.etas) or self.record or self.grad_steps or partial):
            raise PipelineError(
                "solver 'dpm++' is for inference only; eta, record, grad_steps, start_step and exit_step need solver"
                " 'ddim'."
            )


def _ddim(
    process: NoiseProcess, predict: Predictor, x: Tensor, noise: Iterator[Tensor] | None, plan: _Plan
) -> Trajectory:
    grid, next_grid = process.schedule(plan.steps)
    if plan.exit_step is not None:
        next_grid[plan.exit_step] = -1
    on_device = grid.to(x.device)
    first = min(plan.grad_steps, default=plan.steps)
    if noise is not None:
        noise = itertools.islice(noise, plan.start_step, None)
    states, means, stds, log_probs = [x.detach()], [], [], []
    for index in plan.span:
        with torch.set_grad_enabled(index in plan.grad_steps):
            output = predict(x, on_device[index].expand(len(x)))
        with torch.set_grad_enabled(index >= first):
            t, t_next = grid[index].item(), next_grid[index].item()
            if index == plan.exit_step:
                mean, std = process.clean(x, output, t), x.new_zeros((1,) * x.ndim)
            else:
                mean, std = process.reverse_step(x, output, t, t_next, plan.etas[index])
            x = mean if noise is None else mean + std * next(noise)
            if plan.record:
                states.append(x.detach())
                means.append(mean)
                stds.append(std.reshape(-1).expand(len(x)))
                log_probs.append(gaussian_log_prob(x.detach(), mean, std))
    ran = slice(plan.span[0], plan.span[-1] + 1)
    recorded = [torch.stack(kept) for kept in (states, means, stds, log_probs)] if plan.record else []
    return Trajectory(x, grid[ran], next_grid[ran], *recorded)


def replay_step(
    process: NoiseProcess,
    trajectory: Trajectory,
    index: int,
    predict: Predictor,
    *,
    eta: float,
    rows: Int[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return mean, std and log-prob of step `index` of a recorded trajectory under the network behind `predict`.

    With the network, guidance and `eta` that drew it, these are the recorded ones; the mean and the log-prob carry
    the gradient of the network. `rows` picks samples (all by default); `predict` must be made for those.
    """
    assert trajectory.states is not None, "the trajectory was sampled without record=True"
    x, x_next = trajectory.states[index], trajectory.states[index + 1]
    if rows is not None:
        x, x_next = x[rows], x_next[rows]
    t, t_next = trajectory.timesteps[index], trajectory.next_timesteps[index]
    mean, std = process.reverse_step(x, predict(x, t.to(x.device).expand(len(x))), t.item(), t_next.item(), eta)
    std = std.reshape(-1).expand(len(x))
    return mean, std, gaussian_log_prob(x_next, mean, std)


def _dpm_solver(generator: Generator, predict: Predictor, x: Tensor, steps: int) -> Trajectory:
    from diffusers import DPMSolverMultistepScheduler

    process = generator.process
    if process.prediction == "flow":
        raise PipelineError("solver 'dpm++' is for diffusion models; use solver 'ddim' for a flow model.")
    scheduler = DPMSolverMultistepScheduler.from_config(generator.scheduler.config, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps
    if len(grid.unique()) < len(grid):
        levels = process.num_train_timesteps
        raise PipelineError(f"solver 'dpm++' has no {steps} different steps on {levels} levels; take fewer.")
    on_device = grid.to(x.device)
    with torch.no_grad():
        for index, t in enumerate(grid.tolist()):
            output = predict(x, on_device[index].expand(len(x)))
            x = scheduler.step(output, t, x, return_dict=False)[0]
    return Trajectory(x, grid, torch.cat([grid[1:], grid.new_tensor([-1])]))


def inversion_grid(
    process: Any, steps: int, t: int | Tensor | None = None, grid: Literal["exact", "floor"] = "exact"
) -> tuple[Tensor, Tensor]:
    """Return the ascending levels that `invert` leaves from and goes to, each ``[steps]`` or ``[steps, batch]``.

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

    `eta` adds to each step that many times the noise that the sampler's step back would add, drawn from `seeds`, one
    a sample. `autocast` makes the context of each network call.
    """
    if renoise < 0:
        raise PipelineError(f"renoise must be 0 or more, got {renoise}.")
    if len(latents) != len(cond):
        raise PipelineError(f"invert got {len(latents)} latents but {len(cond)} prompts.")
    if eta and (seeds is None or len(seeds) != len(latents)):
        raise PipelineError(f"invert with eta {eta} needs seeds, one integer a sample.")
    process = generator.process
    sources, targets = inversion_grid(process, steps, t, grid)
    predict = guided_predictor(generator, cond, guidance, negative, autocast=autocast)
    x = latents.to(generator.device, _precision(generator))
    draws = noise_stream(seeds, latents.shape[1:], x.device) if eta and seeds is not None else None
    sources, targets = (levels.to(x.device).reshape(steps, -1).expand(-1, len(x)) for levels in (sources, targets))
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            guess, total, seen = x, torch.zeros_like(x), target.clamp_min(0)
            for repeat in range(renoise + 1):
                total = total + process.to_noise(guess, predict(guess, seen), target)
                guess = process.forward_step(x, total / (repeat + 1), source, target)
            if draws is not None:
                guess = guess + process.reverse_step(guess, total, target, source, eta)[1] * next(draws)
            x = torch.where((target > source).reshape(-1, *[1] * (x.ndim - 1)), guess, x)
    return x


def _precision(generator: Generator) -> torch.dtype:
    return torch.float64 if generator.dtype == torch.float64 else torch.float32


def _check_batch(
    generator: Generator,
    cond: Conditioning,
    random: bool,
    seeds: Sequence[int] | None,
    latents: Tensor | None,
    batch_size: int | None,
) -> None:
    """Raise `PipelineError` unless seeds and latents go with the prompts and the model."""
    if seeds is None and (latents is None or random):
        raise PipelineError("sample needs seeds, one integer a prompt, unless latents are given and eta is 0.")
    for name, given in (("seeds", seeds), ("latents", latents)):
        if given is not None and len(given) != len(cond):
            raise PipelineError(f"sample needs one of {name} for each of {len(cond)} prompts, got {len(given)}.")
    if batch_size is not None and batch_size < 1:
        raise PipelineError(f"batch_size must be at least 1, got {batch_size}.")
    if latents is None:
        return
    expected = generator.latent_shape
    if latents.ndim != 1 + len(expected):
        raise PipelineError(f"latents of this model are [batch, {_listed(expected)}], got {list(latents.shape)}.")
    if len(expected) > 2 and latents.shape[1] != expected[0]:
        raise PipelineError(f"latents must have {expected[0]} channels for this model, got {list(latents.shape)}.")


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
