"""DPM-Solver++ for flow matching: its formula in lambda, its order on a Gaussian, and a whole sample of a model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_tools import PROMPTS, load, noise
from tiny_models import build_tiny_sd3
from torch import Tensor

from pipelines import guided_predictor, sample
from pipelines.multistep import dpm_solver
from pipelines.noise import NoiseProcess, Schedule

MEAN, STD = 0.7, 0.4


def process(shift: float = 3.0) -> NoiseProcess:
    return NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """Return ``E[noise - x0]`` for data of N(MEAN, STD^2): x at sigma is N((1 - sigma) MEAN, variance)."""
    sigma = (t.double() / 1000).reshape(-1, 1)
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    centred = x - (1 - sigma) * MEAN
    clean = MEAN + (1 - sigma) * STD**2 / variance * centred
    return sigma / variance * centred - clean


def levels(count: int, top: float = 1000.0) -> Schedule:
    grid = torch.linspace(top, top / count, count, dtype=torch.float64)
    return Schedule(grid, torch.cat([grid[1:], grid.new_tensor([-1.0])]))


def in_lambda(x: Tensor, sigmas: list[float]) -> Tensor:
    """The solver as arXiv 2211.01095 writes it (algorithm 2), with alpha = 1 - sigma; DDIM's step first and last."""
    predictions: list[Tensor] = []
    for index, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        predictions.append(x - s * velocity(x, torch.full((len(x),), 1000 * s, dtype=torch.float64)))
        m0 = predictions[-1]
        if index == 0 or index == len(sigmas) - 2:
            x = (1 - t) * m0 + t * (x - (1 - s) * m0) / s
            continue
        lam = [math.log(1 - sigma) - math.log(sigma) for sigma in (sigmas[index - 1], s, t)]
        h0, h = lam[1] - lam[0], lam[2] - lam[1]
        d1 = (m0 - predictions[-2]) / (h0 / h)
        factor = (1 - t) * (math.exp(-h) - 1)
        x = t / s * x - factor * m0 - 0.5 * factor * d1
    return x


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_it_is_the_published_formula(count: int) -> None:
    x, schedule = noise(5, 3).double(), levels(count, top=990.0)  # below 1000, where log(1 - sigma) has no bound
    found, used = dpm_solver(process(), None, velocity, x, schedule)
    expected = in_lambda(x, [*(schedule.levels / 1000).tolist(), 0.0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert used is schedule


def exact(x: Tensor, start: float, end: float) -> Tensor:
    """Return where the flow of the Gaussian takes `x` from one level to another, at the same quantile."""
    mean, spread = ([(1 - s) * MEAN for s in (start, end)], [math.hypot((1 - s) * STD, s) for s in (start, end)])
    return mean[1] + spread[1] / spread[0] * (x - mean[0])


def test_it_is_of_second_order_in_lambda() -> None:
    """Levels even in lambda from sigma = 0.95 to 0.05, and from there the step to the end, the predicted x0."""
    x, errors = noise(64, 1).double(), []
    for count in (20, 40, 80, 160):
        lam = torch.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), count + 1, dtype=torch.float64)
        grid = 1000.0 / (1.0 + lam.exp())
        found, _ = dpm_solver(process(), None, velocity, x, Schedule(grid, torch.cat([grid[1:], -torch.ones(1)])))
        last = exact(x, 0.95, 0.05)
        expected = last - 0.05 * velocity(last, torch.full((len(x),), 50.0))
        errors.append(float((found - expected).abs().max()))
    orders = [math.log2(first / second) for first, second in zip(errors[:-1], errors[1:], strict=True)]
    assert orders == pytest.approx([2.0] * 3, abs=0.15)


def test_it_is_exact_with_many_steps_and_nearer_than_euler() -> None:
    """From noise to data, where lambda has no bound at either end: MEAN + STD x."""
    x = noise(64, 1).double()
    solver, euler = [], []
    for count in (10, 40, 160, 640):
        found = dpm_solver(process(), None, velocity, x, levels(count))[0]
        solver.append(float((found - exact(x, 1.0, 0.0)).abs().max()))
        other = x
        for t, t_next in zip(*levels(count), strict=True):
            other = other + (max(float(t_next), 0.0) - float(t)) / 1000 * velocity(other, t.expand(len(x)))
        euler.append(float((other - exact(x, 1.0, 0.0)).abs().max()))
    assert solver[-1] < 1e-4 and solver == sorted(solver, reverse=True)
    assert all(first < second / 5 for first, second in zip(solver, euler, strict=True))


def test_a_model_is_sampled_on_its_own_levels(tmp_path: Path) -> None:
    """Against the formula around the guided network; batches and seeds do not matter; one step is Euler's."""
    generator = load(build_tiny_sd3(tmp_path / "sd3"))
    cond, x = generator.encode_prompts(PROMPTS), noise(2, 16, 8, 8)
    options = {"guidance": 3.0, "latents": x}
    found = sample(generator, cond, steps=5, solver="dpm++", **options)
    assert torch.equal(found.timesteps, generator.schedule(5).levels)
    predict = guided_predictor(generator, cond, 3.0)
    expected, _ = dpm_solver(generator.process, generator.scheduler, predict, x, generator.schedule(5))
    assert torch.equal(found.latents, expected)
    singly = sample(generator, cond, steps=5, solver="dpm++", batch_size=1, **options)
    torch.testing.assert_close(singly.latents, found.latents, rtol=1e-4, atol=1e-4)
    one = [sample(generator, cond, steps=1, solver=solver, **options).latents for solver in ("ddim", "dpm++")]
    torch.testing.assert_close(*one, rtol=1e-5, atol=1e-5)
    assert (found.latents - sample(generator, cond, steps=5, **options).latents).abs().max() > 1e-3
