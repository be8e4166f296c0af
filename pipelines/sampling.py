"""Sample latents step by step with any kernel, recorded, replayed or with a gradient; or by DPM-Solver++.

Steps are defined in `pipelines.kernels`, DPM-Solver++ in `pipelines.multistep` (inference only).
Truncated gradients through the sampler: `pipelines.gradient_sampling`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError, choose
from pipelines.generator import Generator
from pipelines.guidance import Autocast, Predictor, guided_predictor
from pipelines.kernels import CLEAN, Kernel, pick_kernel
from pipelines.multistep import dpm_solver
from pipelines.noise import NoiseProcess, Schedule

SOLVERS = ("ddim", "dpm++")


@dataclass
class Trajectory:
    """The result of sampling; all tensors are float32 (float64 if the network is).

    latents
        The clean latents, ``[batch, *latent]``.
    timesteps, next_timesteps
        The level each step started from and led to (-1 at the end), ``[steps]``, on the CPU; with a range of steps to
        ``record`` those alone, here and below.
    states, means, stds, log_probs
        With ``record``: ``states[i]`` is x before step i and ``states[i + 1]`` x after it, at the end the latents;
        ``means[i]`` and ``stds[i]`` are the Gaussian that ``states[i + 1]`` was drawn from; ``log_probs[i]`` is its
        log-density there, the MEAN over latent dimensions (nats). Shapes ``[steps + 1, batch, ...]``, ``[steps,
        batch, ...]`` and ``[steps, batch]`` twice. Means and log-probs of the steps in ``grad_steps`` carry
        gradients, states never do.
    kernels
        With ``record``: the kernel of each step, for `replay_step`.
    """

    latents: Float[Tensor, "batch *latent"]
    timesteps: Shaped[Tensor, " steps"]
    next_timesteps: Shaped[Tensor, " steps"]
    states: Float[Tensor, "states batch *latent"] | None = None
    means: Float[Tensor, "steps batch *latent"] | None = None
    stds: Float[Tensor, "steps batch"] | None = None
    log_probs: Float[Tensor, "steps batch"] | None = None
    kernels: tuple[Kernel, ...] = ()

    def select(self, rows: Int[Tensor, " rows"]) -> Trajectory:
        """Return some of the samples, by their numbers."""
        names = [name for name in ("states", "means", "stds", "log_probs") if getattr(self, name) is not None]
        kept = {name: getattr(self, name)[:, rows] for name in names}
        return Trajectory(self.latents[rows], self.timesteps, self.next_timesteps, **kept, kernels=self.kernels)

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join trajectories over the same timesteps along the batch."""
        first = parts[0]
        joined: dict[str, Tensor] = {}
        for name in ("states", "means", "stds", "log_probs"):
            if getattr(first, name) is not None:
                joined[name] = torch.cat([getattr(part, name) for part in parts], dim=1)
        latents = torch.cat([part.latents for part in parts])
        return Trajectory(latents, first.timesteps, first.next_timesteps, **joined, kernels=first.kernels)


@dataclass(frozen=True)
class Segment:
    """The steps of a sampling grid to run, and those with a gradient; by default all, and none.

    start
        Index of the first step; the latents given are at its level.
    exit
        Index of the last step, which then ends in the clean latents that its prediction implies; None: the whole way.
    grad_steps
        Indices of the steps whose network call keeps its graph; the predictions of other steps are constants, while
        the linear path from step to step carries the gradient on from the first of them. Nothing before it has a
        graph.
    grad_steps_each
        The same for each sample by itself, all within `grad_steps`; None: those for all. At a step that some samples
        train, they and the others are two network calls.
    checkpoint
        Keep no activations of those calls: the backward pass computes them again (`guided_predictor`).
    """

    start: int = 0
    exit: int | None = None
    grad_steps: Collection[int] = ()
    grad_steps_each: Sequence[Collection[int]] | None = None
    checkpoint: bool = False

    def span(self, steps: int) -> range:
        """Return the indices of a grid of `steps` that run; raises `PipelineError` for steps outside of it."""
        for name, index in (("start", self.start), ("exit", self.exit)):
            if index is not None and not 0 <= index < steps:
                raise PipelineError(f"{name} of a segment must lie in 0..{steps - 1} for {steps} steps, got {index}.")
        span = range(self.start, steps if self.exit is None else self.exit + 1)
        if not span:
            raise PipelineError(f"exit {self.exit} of a segment comes before its start {self.start}; swap them.")
        outside = sorted(index for index in self.grad_steps if index not in span)
        if outside:
            raise PipelineError(f"grad_steps must lie in {span[0]}..{span[-1]} for {steps} steps, got {outside}.")
        return span

    @classmethod
    def of_each(cls, steps: Sequence[Collection[int]], *, start: int = 0, checkpoint: bool = False) -> Segment:
        """Return the segment in which each sample has trained steps of its own."""
        every = sorted(set().union(*steps))
        each = None if all(sorted(one) == every for one in steps) else steps
        return cls(start, None, every, each, checkpoint)

    def trained(self, index: int, samples: range) -> list[int]:
        """Return which of some samples, counted from 0, keep the graph of their network call at a step."""
        if self.grad_steps_each is None or index not in self.grad_steps:
            return list(range(len(samples))) if index in self.grad_steps else []
        return [row for row, sample in enumerate(samples) if index in self.grad_steps_each[sample]]


WHOLE = Segment()


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
    steps: int | Schedule = 50,
    guidance: float = 7.5,
    kernel: Kernel | str | None = None,
    eta: float | Sequence[float] | None = None,
    solver: str = "ddim",
    seeds: Sequence[int] | None = None,
    negative: Conditioning | None = None,
    latents: Float[Tensor, "batch *latent"] | None = None,
    segment: Segment = WHOLE,
    record: bool | range = False,
    autocast: Autocast = nullcontext,
    batch_size: int | None = None,
) -> Trajectory:
    """Sample latents for a batch of prompts; decode them with ``generator.decode(trajectory.latents)``.

    `steps` is their number, or the levels themselves (`NoiseProcess.schedule`). `kernel` defines the steps, an object
    or a name in `KERNELS`; `eta` is short for ``kernel=ddim(eta)``, and 0 by default: the result is then that
    of diffusers' own pipeline with `DDIMScheduler` (Euler's for flow matching). ``solver="dpm++"`` has no kernel and
    is for inference only.

    Each sample depends on its seed and prompt alone. `latents` replaces the initial noise; seeds are then needed by a
    random kernel only. `segment` runs a part of the grid, or keeps a graph; nothing has one otherwise. `record` keeps
    states and per-step log-probabilities, of all steps or of a range of them. `guidance`, `negative` and `autocast`
    are those of `guided_predictor`.
    `batch_size` splits the work. Raises `PipelineError` for arguments that do not fit the model, the prompts or each
    other.

    >>> from pipelines import load_generator
    >>> generator = load_generator("assets/shapes-sd")
    >>> cond = generator.encode_prompts(["a red circle", "two blue stars"])
    >>> drawn = sample(generator, cond, steps=4, guidance=3.0, eta=1.0, seeds=[1, 2], record=True)
    >>> drawn.latents.shape == (2, *generator.latent_shape), drawn.log_probs.shape
    (True, torch.Size([4, 2]))
    """
    shape = generator.latent_shape if latents is None else latents.shape[1:]
    schedule = steps if isinstance(steps, Schedule) else generator.schedule(steps, shape)
    chosen = pick_kernel(kernel, eta)
    chosen.check(generator.process)
    plan = _Plan(schedule, chosen.for_steps(len(schedule.levels)), segment, record)
    own = kernel or chosen.random or record or segment != WHOLE or schedule is steps
    if choose("solver", solver, SOLVERS) == "dpm++" and own:
        raise PipelineError(
            "solver 'dpm++' is for inference only, on its own levels; kernel, eta, record, segment and a schedule of"
            " yours need 'ddim'."
        )
    _check_batch(generator, cond, chosen.random, seeds, latents, batch_size)
    if segment.start and latents is None:
        raise PipelineError(f"a segment from step {segment.start} on needs latents at the level of that step.")
    parts = []
    for start in range(0, len(cond), batch_size or len(cond)):
        part = slice(start, start + (batch_size or len(cond)))
        # The initial draw is taken even when latents are given, so that the noise of later steps is the same.
        noise = None if seeds is None else noise_stream(seeds[part], shape, generator.device)
        drawn = None if noise is None else next(noise)
        x = drawn if latents is None else latents[part]
        assert x is not None
        x = x.to(generator.device, latent_dtype(generator))
        against = negative if negative is None or len(negative) == 1 else negative[part]
        options: dict[str, Any] = {"autocast": autocast, "checkpoint": segment.checkpoint}
        predict = _PartlyTrained(generator, cond[part], guidance, against, options)
        if solver == "dpm++":
            clean, used = dpm_solver(generator.process, generator.scheduler, predict.all, x, schedule)
            parts.append(Trajectory(clean, *used))
        else:
            samples = range(len(cond))[part]
            parts.append(_run(generator.process, predict, x, noise if chosen.random else None, plan, samples))
    return parts[0] if len(parts) == 1 else Trajectory.cat(parts)


class _PartlyTrained:
    """The network calls of a batch, with a graph for some of the samples."""

    def __init__(
        self,
        generator: Generator,
        cond: Conditioning,
        guidance: float,
        negative: Conditioning | None,
        options: dict[str, Any],
    ) -> None:
        self.given = (generator, cond, guidance, negative, options)
        self.all = guided_predictor(generator, cond, guidance, negative, **options)

    def __call__(self, x: Tensor, t: Tensor, trained: list[int]) -> Tensor:
        """Return the predictions of all samples; those of samples that are not trained are constants."""
        if len(trained) in (0, len(x)):
            with torch.set_grad_enabled(bool(trained)):
                return self.all(x, t)
        others = sorted(set(range(len(x))) - set(trained))
        with torch.no_grad():
            constant = self._of(others)(x[others], t[others])
        with torch.enable_grad():
            kept = self._of(trained)(x[trained], t[trained])
            return torch.cat([kept, constant])[torch.tensor(trained + others).argsort().to(x.device)]

    def _of(self, rows: list[int]) -> Predictor:
        generator, cond, guidance, negative, options = self.given
        against = negative if negative is None or len(negative) == 1 else negative[torch.tensor(rows)]
        return guided_predictor(generator, cond[torch.tensor(rows)], guidance, against, **options)


class _Plan:
    """The kernels of a grid, the steps that run, and whether they are recorded."""

    def __init__(self, schedule: Schedule, kernels: Sequence[Kernel], segment: Segment, record: bool | range) -> None:
        self.levels, self.next_levels = schedule.levels, schedule.next_levels.clone()
        self.kernels, self.segment = list(kernels), segment
        self.span = segment.span(len(self.levels))
        every = self.span if record else range(0)
        self.recorded = record if isinstance(record, range) else every
        if self.recorded.step != 1 or not set(self.recorded) <= set(self.span):
            raise PipelineError(f"record must be steps in a row of {self.span[0]}..{self.span[-1]}, got {record}.")
        if segment.exit is not None:
            self.next_levels[segment.exit], self.kernels[segment.exit] = -1, CLEAN


def _run(
    process: NoiseProcess,
    predict: _PartlyTrained,
    x: Tensor,
    noise: Iterator[Tensor] | None,
    plan: _Plan,
    samples: range,
) -> Trajectory:
    on_device = plan.levels.to(x.device)
    first = min(plan.segment.grad_steps, default=len(plan.levels))
    if noise is not None:
        noise = itertools.islice(noise, plan.segment.start, None)
    states: list[Tensor] = []
    means, stds, log_probs = [], [], []
    for index in plan.span:
        if plan.recorded and index == plan.recorded[0]:
            states.append(x.detach())
        output = predict(x, on_device[index].expand(len(x)), plan.segment.trained(index, samples))
        with torch.set_grad_enabled(index >= first):
            level, next_level = plan.levels[index].item(), plan.next_levels[index].item()
            mean, std = plan.kernels[index](process, x, output, level, next_level)
            x = mean if noise is None else mean + std * next(noise)
            if index in plan.recorded:
                states.append(x.detach())
                means.append(mean)
                stds.append(std.reshape(-1).expand(len(x)))
                log_probs.append(gaussian_log_prob(x.detach(), mean, std))
    kept_steps = plan.recorded or plan.span
    ran = slice(kept_steps[0], kept_steps[-1] + 1)
    if not plan.recorded:
        return Trajectory(x, plan.levels[ran], plan.next_levels[ran])
    kept = {"states": states, "means": means, "stds": stds, "log_probs": log_probs}
    stacked = {name: torch.stack(each) for name, each in kept.items()}
    return Trajectory(x, plan.levels[ran], plan.next_levels[ran], **stacked, kernels=tuple(plan.kernels[ran]))


def replay_step(
    process: NoiseProcess,
    trajectory: Trajectory,
    index: int,
    predict: Predictor,
    *,
    rows: Int[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "rows *latent"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return mean, std and log-prob of step `index` of a recorded trajectory under the network behind `predict`.

    With the network and guidance that drew it, these are the recorded ones, since the kernel is the one that drew it;
    the mean and the log-prob carry the gradient of the network. `rows` picks samples (all by default); `predict` must
    be made for those.
    """
    assert trajectory.states is not None, "the trajectory was sampled without record=True"
    x, x_next = trajectory.states[index], trajectory.states[index + 1]
    if rows is not None:
        x, x_next = x[rows], x_next[rows]
    t, t_next = trajectory.timesteps[index], trajectory.next_timesteps[index]
    output = predict(x, t.to(x.device).expand(len(x)))
    mean, std = trajectory.kernels[index](process, x, output, t.item(), t_next.item())
    std = std.reshape(-1).expand(len(x))
    return mean, std, gaussian_log_prob(x_next, mean, std)


def latent_dtype(generator: Generator) -> torch.dtype:
    """Return the dtype of latents outside of the network: float32, or float64 for a float64 network."""
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
        raise PipelineError(
            "sample needs seeds, one integer a prompt, unless latents are given and no step adds noise (eta 0)."
        )
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
