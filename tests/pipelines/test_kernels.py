"""Kernels: against diffusers, against published numbers, and against Gaussian data in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from ideal_denoiser import SPREAD, IdealGenerator
from tiny_models import tiny_scheduler
from torch import Tensor

from pipelines import (
    KERNELS,
    Kernel,
    NoiseProcess,
    PipelineError,
    cps,
    dance,
    ddim,
    flow_sde,
    guided_predictor,
    named_kernel,
    ode,
    sample,
    seeded_noise,
    wan_sde,
)
from pipelines.sampling import noise_stream, replay_step

FLOW = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
SHAPE = (2, 3, 2, 4)
"""A video: channels, frames, height, width."""
SEEDS = [3, 4]


def draws(*indices: int) -> list[Tensor]:
    return [torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in indices]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_of_a_grid_equals_diffusers(kind: str, eta: float) -> None:
    scheduler = DDIMScheduler.from_config(tiny_scheduler(kind).config)
    process = NoiseProcess.from_scheduler(scheduler)
    x, output, noise = (one.float() for one in draws(0, 1, 2))
    scheduler.set_timesteps(10)
    for t, t_next in zip(*(levels.tolist() for levels in process.schedule(10)), strict=True):
        expected = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        mean, std = ddim(eta)(process, x, output, t, t_next)
        torch.testing.assert_close(mean + std * noise, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "kernel", [ode(), ddim(0.0), flow_sde(0.0), dance(0.0), wan_sde(0.0), cps(0.0)], ids=lambda kernel: kernel.name
)
def test_without_noise_every_kernel_is_eulers_step(kernel: Kernel) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, velocity = draws(0, 1)
    for t, t_next in zip(*(levels.tolist() for levels in FLOW.schedule(10)), strict=True):
        mean, std = kernel(FLOW, x, velocity, t, t_next)
        torch.testing.assert_close(mean, x + (max(t_next, 0) - t) / 1000 * velocity, rtol=1e-12, atol=1e-12)
        diffusers = scheduler.step(velocity.float(), t, x.float()).prev_sample
        torch.testing.assert_close(mean.float(), diffusers, rtol=1e-5, atol=1e-5)
        assert not std.any() and std.shape == (1,) * x.ndim


def test_standard_deviations_are_those_of_the_published_code() -> None:
    """SD3's grid of 10 steps; computed from the authors' formulas by hand, to four digits."""
    sde = [0.7, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
    assert flow_sde(0.7).stds(FLOW, 10) == pytest.approx(sde, abs=5e-5)
    preserving = [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0.0]
    assert cps(0.8).stds(FLOW, 10) == pytest.approx(preserving, abs=5e-5)
    dancing = [0.0599, 0.0649, 0.0708, 0.0778, 0.0865, 0.0973, 0.1112, 0.1297, 0.1556, 0.0283]
    assert dance(0.3).stds(FLOW, 10) == pytest.approx(dancing, abs=5e-5)
    assert ode().stds(FLOW, 10) == [0.0] * 10
    window = [0.0] * 2 + [0.7] * 3 + [0.0] * 5
    assert flow_sde(window).stds(FLOW, 10) == pytest.approx([0.0] * 2 + sde[2:5] + [0.0] * 5, abs=5e-5)


SCHEDULER_GRID = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
FOURTEEN = [
    1,
    0.9731,
    0.9430,
    0.9094,
    0.8715,
    0.8283,
    0.7787,
    0.7213,
    0.6539,
    0.5738,
    0.4769,
    0.3574,
    0.2062,
    0.0089,
    0,
]
EVEN_GRID = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0]
SIXTEEN = [
    1, 0.9783, 0.9545, 0.9286, 0.9, 0.8684, 0.8333, 0.7941, 0.75, 0.7, 0.6429, 0.5769, 0.5, 0.4091, 0.3, 0.1667, 0
]  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "even"),
    [(SCHEDULER_GRID, False), (FOURTEEN, False), (EVEN_GRID, True), (SIXTEEN, True)],
    ids=["scheduler 10", "scheduler 14", "even 10", "even 16"],
)
def test_both_grids_in_use_are_those_of_the_published_codes(expected: list[float], even: bool) -> None:
    """The scheduler's ends at its lowest level, shifted twice; DanceGRPO's is the shift of an even one."""
    steps = len(expected) - 1
    sigmas = [1 - step / steps for step in range(steps)] if even else None
    levels, next_levels = FLOW.schedule(steps, sigmas=sigmas)
    assert [level / 1000 for level in levels.tolist()] == pytest.approx(expected[:-1], abs=5e-5)
    assert [max(level, 0) / 1000 for level in next_levels.tolist()] == pytest.approx(expected[1:], abs=5e-5)


def test_stochastic_steps_are_their_published_formulas_in_numpy() -> None:
    """Each code's own expression, the first step with the second level in place of sigma = 1 in its denominator."""
    x, v = (one.numpy() for one in draws(0, 1))
    grid = np.array([float(level) / 1000 for level in FLOW.schedule(10).levels] + [0.0])
    for index in range(10):
        sigma, after = grid[index], grid[index + 1]
        dt, clean, noise = after - sigma, x - sigma * v, x + (1 - sigma) * v
        s = 0.7 * np.sqrt(sigma / (1 - (grid[1] if sigma == 1 else sigma)))
        angle = 0.8 * np.pi / 2
        expected = {
            flow_sde(0.7): (
                x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt,
                s * np.sqrt(-dt),
            ),
            # DanceGRPO adds half eta^2 times the score, written by the predicted clean image.
            dance(0.3): (
                x + (v + 0.5 * 0.3**2 * (x - (1 - sigma) * clean) / sigma**2) * dt,
                0.3 * np.sqrt(-dt),
            ),
            wan_sde(float(grid[1])): (
                x + (v + (grid[1] * sigma) ** 2 * noise / (2 * sigma)) * dt,
                grid[1] * sigma * np.sqrt(-dt),
            ),
            cps(0.8): (
                clean * (1 - after) + noise * np.sqrt(after**2 - (after * np.sin(angle)) ** 2),
                after * np.sin(angle),
            ),
        }
        t, t_next = (levels[index].item() for levels in FLOW.schedule(10))
        for kernel, (mean, std) in expected.items():
            found, deviation = kernel(FLOW, *(torch.from_numpy(one) for one in (x, v)), t, t_next)
            assert np.isfinite(found.numpy()).all()
            np.testing.assert_allclose(found.numpy(), mean, rtol=1e-12, atol=1e-12)
            assert deviation.item() == pytest.approx(std, rel=1e-12)


def test_dances_step_is_flow_sdes_with_a_constant_coefficient() -> None:
    x, v = draws(0, 1)
    for t, t_next in zip(*(levels.tolist()[1:] for levels in FLOW.schedule(10)), strict=True):
        sigma = t / 1000
        one = dance(0.3)(FLOW, x, v, t, t_next)
        other = flow_sde(0.3 * math.sqrt((1 - sigma) / sigma))(FLOW, x, v, t, t_next)
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kernel", [flow_sde(0.7), dance(0.3), wan_sde(1.0), cps(0.8), ddim(1.0)], ids=str)
def test_samples_of_a_step_have_its_mean_and_variance(kernel: Kernel) -> None:
    """100,000 draws of one step of one latent, within 4 standard errors."""
    seeds, latents = range(500), 200
    generator = IdealGenerator("flow", (latents,), shift=3.0)
    cond = generator.encode_prompts(["1"]).repeat_interleave(len(seeds))
    start = torch.full((len(seeds), latents), 0.4, dtype=torch.float64)
    options = {"steps": 4, "guidance": 1.0, "kernel": kernel, "seeds": seeds, "latents": start}
    drawn = sample(generator, cond, **options, record=range(1))
    mean, std, after = drawn.means[0, 0, 0].item(), drawn.stds[0, 0].item(), drawn.states[1]
    assert float(after.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(after.numel()))
    assert float(after.var()) == pytest.approx(std**2, rel=4 * math.sqrt(2 / after.numel()))


def noise_factor(kernel: Kernel, t: float, t_next: float, process: NoiseProcess = FLOW) -> tuple[float, float]:
    """Return the factors of x0 and of all noise after a step with a true prediction."""
    x0, noise = draws(0, 1)
    x = process.add_noise(x0, noise, t)
    mean, std = kernel(process, x, process.target(x0, noise, t), t, t_next)
    design = torch.stack([x0.flatten(), noise.flatten()], 1)
    signal, kept = torch.linalg.lstsq(design, mean.flatten()).solution.tolist()
    return signal, math.hypot(kept, std.item())


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
@pytest.mark.parametrize("kernel", [cps(0.3), cps(0.8), cps(1.0), ddim(0.5), ddim(1.0)], ids=str)
def test_the_noise_after_a_step_is_exactly_the_schedules(kind: str, kernel: Kernel) -> None:
    process = FLOW if kind == "flow" else NoiseProcess.from_scheduler(tiny_scheduler(kind))
    for t, t_next in zip(*(levels.tolist() for levels in process.schedule(10)), strict=True):
        signal, noise = noise_factor(kernel, t, t_next, process)
        assert signal == pytest.approx(float(process.alpha(t_next)), rel=1e-5)
        assert noise == pytest.approx(float(process.sigma(t_next)), rel=1e-5, abs=1e-9)


def test_flow_sde_keeps_the_signal_and_adds_the_known_excess_of_noise() -> None:
    """The excess over the schedule's noise on SD3's grid of 10 steps, a = 0.7: the visible grain of such rollouts."""
    excess = [1.042, 1.064, 1.028, 1.023, 1.025, 1.036, 1.068, 1.228]
    levels, next_levels = (levels.tolist() for levels in FLOW.schedule(10))
    for t, t_next, expected in zip(levels, next_levels, excess, strict=False):
        signal, noise = noise_factor(flow_sde(0.7), t, t_next)
        assert signal == pytest.approx(1 - t_next / 1000, abs=1e-6)
        assert noise / (t_next / 1000) == pytest.approx(expected, abs=6e-4)


def marginal_error(kernel: Kernel, steps: int, mean: float = 1.5) -> tuple[float, float]:
    """Return how far mean and deviation are off at level 0.2, after `steps` steps with the ideal velocity from 0.8.

    The data are N(mean, SPREAD^2), so that x at level s is N((1 - s) mean, (1 - s)^2 SPREAD^2 + s^2) and everything
    stays Gaussian: two probes give the line that a step is, and mean and variance follow.
    """
    generator = IdealGenerator("flow", (1,))
    cond = generator.encode_prompts([str(mean), str(mean)])
    levels = torch.linspace(800, 200, steps + 1, dtype=torch.float64).tolist()
    centre, variance = 0.2 * mean, (0.2 * SPREAD) ** 2 + 0.8**2
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, t_next in zip(levels[:-1], levels[1:], strict=True):
        with torch.no_grad():
            velocity = generator.predict(probes, torch.tensor([t, t], dtype=torch.float64), cond)
        after, std = kernel(generator.process, probes, velocity, t, t_next)
        offset, slope = after[0].item(), (after[1] - after[0]).item()
        centre, variance = offset + slope * centre, slope**2 * variance + std.item() ** 2
    return abs(centre - 0.8 * mean), abs(variance**0.5 - math.hypot(0.8 * SPREAD, 0.2))


@pytest.mark.parametrize("kernel", [ode(), flow_sde(0.7), flow_sde(1.2), dance(0.3), wan_sde(1.0), ddim(1.0)], ids=str)
def test_marginals_of_gaussian_data_are_kept_to_first_order(kernel: Kernel) -> None:
    errors = [marginal_error(kernel, steps) for steps in (40, 80, 160)]
    assert max(mean for mean, _ in errors) < 1e-12
    coarse, fine, finest = (deviation for _, deviation in errors)
    assert coarse / fine == pytest.approx(2, abs=0.12) and fine / finest == pytest.approx(2, abs=0.06)
    assert finest < 0.004


def test_coefficients_preserving_sampling_stays_off_the_marginals() -> None:
    """Its std is sigma' sin(eta pi/2) however short the step, so short steps do not bring it to the data's own."""
    errors = [marginal_error(cps(0.3), steps) for steps in (40, 160, 640)]
    assert max(mean for mean, _ in errors) < 1e-12
    assert [deviation for _, deviation in errors] == pytest.approx([0.0163, 0.0117, 0.0105], abs=2e-4)


@pytest.mark.parametrize("kernel", [flow_sde(0.7), cps(0.8), ddim(0.5), flow_sde([0.0, 0.7, 0.7, 0.0])], ids=str)
def test_sampling_draws_from_the_kernel_and_replay_gives_the_recorded_step(kernel: Kernel) -> None:
    generator = IdealGenerator("flow", SHAPE, shift=3.0)
    cond = generator.encode_prompts(["1", "-2"])
    drawn = sample(generator, cond, steps=4, guidance=2.0, kernel=kernel, seeds=SEEDS, record=True)
    stds = kernel.stds(generator.process, 4)
    stream, predict = noise_stream(SEEDS, SHAPE), guided_predictor(generator, cond, 2.0)
    assert torch.equal(drawn.states[0], next(stream).to(drawn.states))
    for index, std in enumerate(stds):
        assert drawn.stds[index].tolist() == pytest.approx([std, std], rel=1e-5)
        shifted = drawn.means[index] + std * next(stream).double()
        torch.testing.assert_close(drawn.states[index + 1], shifted, rtol=1e-5, atol=1e-6)
        mean, again, log_prob = replay_step(generator.process, drawn, index, predict)
        assert torch.equal(mean, drawn.means[index]) and torch.equal(again, drawn.stds[index])
        assert torch.equal(log_prob, drawn.log_probs[index]) and bool((log_prob != 0).all()) == (std > 0)


def test_a_range_of_steps_is_recorded_alone_and_replayed() -> None:
    generator = IdealGenerator("flow", SHAPE, shift=3.0)
    cond = generator.encode_prompts(["1", "-2"])
    options = {"steps": 6, "guidance": 2.0, "kernel": cps([0.0, 0.0, 0.8, 0.8, 0.0, 0.0]), "seeds": SEEDS}
    whole, part = (sample(generator, cond, **options, record=record) for record in (True, range(2, 4)))
    assert torch.equal(whole.latents, part.latents) and part.kernels == whole.kernels[2:4]
    assert torch.equal(part.states, whole.states[2:5])
    for name in ("means", "stds", "log_probs", "timesteps", "next_timesteps"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:4]), name
    predict = guided_predictor(generator, cond, 2.0)
    for index in range(2):
        assert torch.equal(replay_step(generator.process, part, index, predict)[2], part.log_probs[index])
    for wrong in (range(5, 7), range(0, 4, 2)):
        with pytest.raises(PipelineError, match=r"record must be steps in a row of 0\.\.5"):
            sample(generator, cond, **options, record=wrong)


def test_a_constant_negative_prediction_gives_no_gradient() -> None:
    """The one weight scales the prompt's mean; with guidance w the two branches have gradients w and 1 - w."""
    generator = IdealGenerator("flow", SHAPE)
    cond, against = generator.encode_prompts(["1"]), generator.encode_prompts(["3"])
    x, t = draws(0)[0][:1], torch.tensor([500.0])
    gradients = []
    for constant in (False, True):
        output = guided_predictor(generator, cond, 4.0, against, constant_negative=constant)(x, t)
        gradients.append(torch.autograd.grad(output.sum(), generator.network.weight)[0].item())
    alone = torch.autograd.grad(generator.predict(x, t, cond).sum(), generator.network.weight)[0].item()
    assert gradients == pytest.approx([(4 - 3 * 3) * alone, 4 * alone], rel=1e-9)


def test_levels_can_be_given() -> None:
    generator = IdealGenerator("flow", SHAPE, use_dynamic_shifting=True)
    cond = generator.encode_prompts(["1", "-2"])
    schedule = generator.process.schedule(3, mu=0.63, sigmas=[1.0, 2 / 3, 1 / 3])
    drawn = sample(generator, cond, steps=schedule, guidance=1.0, seeds=SEEDS, record=True)
    assert torch.equal(drawn.timesteps, schedule.levels) and torch.equal(drawn.next_timesteps, schedule.next_levels)
    x = seeded_noise(SEEDS, SHAPE).double()
    for t, t_next in zip(*(levels.tolist() for levels in schedule), strict=True):
        with torch.no_grad():
            x = x + (max(t_next, 0) - t) / 1000 * generator.predict(x, torch.tensor([t, t]), cond)
    torch.testing.assert_close(drawn.latents, x, rtol=1e-5, atol=1e-6)


def test_a_kernel_is_chosen_by_name() -> None:
    assert named_kernel("flow_sde", 0.9) == flow_sde(0.9) and named_kernel("cps") == cps(0.8)
    assert {name: factory().name for name, factory in KERNELS.items()} == {name: name for name in KERNELS}
    generator = IdealGenerator("flow", SHAPE)
    options = {"steps": 3, "seeds": SEEDS}
    cond = generator.encode_prompts(["1", "-2"])
    named, given = (sample(generator, cond, kernel=kernel, **options).latents for kernel in ("cps", cps(0.8)))
    assert torch.equal(named, given)
    short, long = sample(generator, cond, eta=0.5, **options), sample(generator, cond, kernel=ddim(0.5), **options)
    assert torch.equal(short.latents, long.latents)


def test_wrong_kernels_are_one_clear_line() -> None:
    x, output = draws(0, 1)
    diffusion = NoiseProcess.from_scheduler(tiny_scheduler("epsilon"))
    wrong: Callable[[], object]
    for wrong, message in [
        (
            lambda: named_kernel("flow-sde"),
            "kernel 'flow-sde' is unknown; allowed: ddim, ode, flow_sde, dance, wan_sde, cps. Did",
        ),
        (lambda: ddim(1.5), r"eta must lie in 0\.\.1 .*got 1.5"),
        (lambda: cps([0.5, -0.1]), r"eta must lie in 0\.\.1 .*got -0.1"),
        (lambda: flow_sde(math.inf), "a must lie in 0.*got inf"),
        (
            lambda: flow_sde()(diffusion, x, output, 500, 400),
            "is for flow matching, and this model predicts 'epsilon'",
        ),
        (lambda: cps([0.5, 0.5])(FLOW, x, output, 500, 400), "has 2 steps; call one of kernel.for_steps"),
        (lambda: ddim([0.5]).for_steps(2), "one for each of 2 steps; got 1"),
    ]:
        with pytest.raises(PipelineError, match=message) as caught:
            wrong()
        assert "\n" not in str(caught.value)
