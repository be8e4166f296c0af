from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from tiny_models import tiny_scheduler

from pipelines import NoiseProcess, PipelineError, ddim, ode

KINDS = ["epsilon", "v_prediction", "sample", "flow"]
SHAPE = (3, 4, 8, 8)


def make(kind: str) -> NoiseProcess:
    return NoiseProcess.from_scheduler(
        FlowMatchEulerDiscreteScheduler(shift=3.0) if kind == "flow" else tiny_scheduler(kind)
    )


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gives_back_media_and_noise(kind: str) -> None:
    process, (x0, noise), t = make(kind), pair(), torch.tensor([20, 500, 999])
    x_t = process.add_noise(x0, noise, t)
    output = process.target(x0, noise, t)
    assert torch.allclose(process.to_x0(x_t, output, t), x0, atol=1e-9)
    assert torch.allclose(process.to_noise(x_t, output, t), noise, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_equals_the_scheduler(kind: str) -> None:
    process, scheduler, (x0, noise), t = (
        make(kind),
        tiny_scheduler(kind),
        pair(torch.float32),
        torch.tensor([0, 7, 999]),
    )
    assert torch.allclose(process.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-6)
    expected = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(process.target(x0, noise, t), expected, atol=1e-6)


def test_flow_is_the_straight_line() -> None:
    process, (x0, noise) = make("flow"), pair()
    assert torch.allclose(process.add_noise(x0, noise, 250), 0.75 * x0 + 0.25 * noise)
    assert torch.equal(process.target(x0, noise, 250), noise - x0)
    assert process.sigma(-1).item() == 0.0 and process.alpha(-1).item() == 1.0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t", "clip", "alpha_one"), [(981, False, False), (1, False, True), (501, True, False)])
def test_the_ddim_kernel_equals_diffusers(kind: str, eta: float, t: int, clip: bool, alpha_one: bool) -> None:
    options = {"clip_sample": clip, "clip_sample_range": 0.7, "set_alpha_to_one": alpha_one}
    scheduler = DDIMScheduler.from_config(tiny_scheduler(kind).config, **options)
    process = NoiseProcess.from_scheduler(scheduler)
    x, output = pair(torch.float32)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(50)
    expected = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
    mean, std = ddim(eta)(process, x, output, t, max(t - 20, -1))
    assert torch.allclose(mean + std * z, expected, atol=2e-5, rtol=1e-5)
    assert bool((std > 0).all()) == (eta > 0 and not (alpha_one and t == 1))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_can_differ_within_a_batch(kind: str) -> None:
    process, (x, output) = make(kind), pair()
    t, t_next = torch.tensor([40, 500, 999]), torch.tensor([-1, 480, 20])
    mean, std = ddim(1.0)(process, x, output, t, t_next)
    for row in range(3):
        one = ddim(1.0)(process, x[row : row + 1], output[row : row + 1], t[row].item(), t_next[row].item())
        assert torch.allclose(mean[row], one[0][0]) and torch.allclose(std[row], one[1][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_true_prediction_keeps_the_noise_level(kind: str, eta: float) -> None:
    """With the exact x0 and noise the step's total variance around alpha' x0 is sigma'^2, for any eta."""
    process, (x0, noise) = make(kind), pair()
    x_t = process.add_noise(x0, noise, 800)
    mean, std = ddim(eta)(process, x_t, process.target(x0, noise, 800), 800, 600)
    coefficient = ((mean - process.alpha(600).double() * x0) / noise).mean()
    assert coefficient**2 + std.item() ** 2 == pytest.approx(process.sigma(600).item() ** 2, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_step_inverts_the_deterministic_step(kind: str) -> None:
    process, (x, output) = make(kind), pair()
    down, _ = ode()(process, x, output, 600, 400)
    assert torch.allclose(process.forward_step(down, process.to_noise(x, output, 600), 400, 600), x, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_grid_equals_diffusers(spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler.from_config(tiny_scheduler("epsilon").config, timestep_spacing=spacing)
    process = NoiseProcess.from_scheduler(scheduler)
    scheduler.set_timesteps(steps)
    grid, following = process.schedule(steps)
    assert torch.equal(grid, scheduler.timesteps) and (following[-1] == -1 or 1000 % steps)
    if spacing == "leading":
        assert torch.equal(grid[1:], following[:-1])


def test_flow_grid_equals_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    grid, following = make("flow").schedule(10)
    assert torch.equal(grid, scheduler.timesteps) and torch.equal(following[:-1], grid[1:]) and following[-1] == -1


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("mu", [0.63, 1.15])
def test_shift_by_size_equals_diffusers(kind: str, terminal: float | None, mu: float) -> None:
    options = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": terminal}
    scheduler, sigmas = FlowMatchEulerDiscreteScheduler(**options), torch.linspace(1, 0.1, 10).tolist()
    process = NoiseProcess.from_scheduler(scheduler)
    for given in (None, sigmas):
        scheduler.set_timesteps(10, sigmas=given, mu=mu)
        grid, following = process.schedule(10, mu=mu, sigmas=given)
        assert torch.equal(grid, scheduler.timesteps) and torch.equal(following[:-1], grid[1:])
        assert following[-1] == -1
    if terminal is None:  # the closed form, on its own
        factor = math.exp(mu) if kind == "exponential" else mu
        expected = [1000 * factor / (factor + 1 / sigma - 1) for sigma in sigmas]
        assert grid.tolist() == pytest.approx(expected, rel=1e-5)
    else:
        assert grid[-1].item() == pytest.approx(1000 * terminal, rel=1e-5)
    # Such models are trained on levels without a shift.
    assert process.sample_timesteps(1, low=499, high=500).item() == pytest.approx(500)


def test_shift_by_size_is_linear_in_the_tokens() -> None:
    """FLUX.1: 0.63 for 512 x 512 and 1.15 for 1024 x 1024 pixels, at 16 x 16 pixels a token."""
    process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    assert [process.mu_for(tokens) for tokens in (256, 1024, 4096)] == pytest.approx([0.5, 0.63, 1.15])
    with pytest.raises(PipelineError, match=r"give mu, such as process.mu_for\(tokens\)"):
        process.schedule(4)
    process.mu = 0.63
    assert torch.equal(process.schedule(4).levels, process.schedule(4, mu=process.mu_for(1024)).levels)


def test_a_fixed_shift_can_be_replaced() -> None:
    """The grids of SD3 in diffusers, whose last level is shifted twice, and of DanceGRPO, shifted once."""
    process = make("flow")
    assert (process.schedule(10).levels / 1000).tolist() == pytest.approx(
        [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089], abs=5e-5
    )
    dance = process.schedule(10, sigmas=torch.linspace(1, 0.1, 10).tolist()).levels / 1000
    assert dance.tolist() == pytest.approx(
        [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25], abs=5e-5
    )
    other = FlowMatchEulerDiscreteScheduler(shift=5.0)
    other.set_timesteps(10)
    assert torch.equal(process.schedule(10, shift=5.0).levels, other.timesteps)
    for options, message in [
        ({"mu": 1.0}, "mu is for schedulers with use_dynamic_shifting"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"sigmas": [1.0]}, "one for each of 10 steps, got 1"),
    ]:
        with pytest.raises(PipelineError, match=message):
            process.schedule(10, **options)
    with pytest.raises(PipelineError, match="are for flow matching"):
        make("epsilon").schedule(10, shift=3.0)


def test_training_timesteps_are_seeded_and_bounded() -> None:
    process = make("epsilon")
    first, again = (process.sample_timesteps(500, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.long and first.min() < 50 and first.max() > 950
    assert set(process.sample_timesteps(200, low=10, high=12).tolist()) == {10, 11}
    flow = make("flow").sample_timesteps(500, generator=torch.Generator().manual_seed(3))
    assert 0 < flow.min() and flow.max() <= 1000 and flow.mean() > 600  # shift 3 favours noisy levels
    with pytest.raises(PipelineError, match="low < high"):
        process.sample_timesteps(1, low=5, high=5)


def test_schedulers_of_other_kinds_keep_their_table() -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    expected = DDIMScheduler(**config).alphas_cumprod.sqrt()
    for scheduler in (PNDMScheduler(**config), EulerDiscreteScheduler(**config)):
        process = NoiseProcess.from_scheduler(scheduler)
        assert process.clip_range is None
        assert torch.allclose(process.alpha(torch.arange(1000)), expected, atol=1e-6)


def test_impossible_schedulers_are_refused() -> None:
    zero_snr = {"rescale_betas_zero_snr": True}
    with pytest.raises(PipelineError, match="zero_snr"):
        NoiseProcess.from_scheduler(DDIMScheduler(**zero_snr))
    assert NoiseProcess.from_scheduler(DDIMScheduler(prediction_type="v_prediction", **zero_snr)).alpha(999) < 1e-6
    with pytest.raises(PipelineError, match="invert_sigmas"):
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(PipelineError, match="thresholds"):
        NoiseProcess.from_scheduler(DDIMScheduler(thresholding=True))
    with pytest.raises(PipelineError, match="steps must lie in 1..1000"):
        make("epsilon").timesteps(1001)
