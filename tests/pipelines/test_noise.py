from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from tiny_models import tiny_scheduler

from pipelines import NoiseProcess, PipelineError

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
def test_reverse_step_equals_ddim(kind: str, eta: float, t: int, clip: bool, alpha_one: bool) -> None:
    options = {"clip_sample": clip, "clip_sample_range": 0.7, "set_alpha_to_one": alpha_one}
    scheduler = DDIMScheduler.from_config(tiny_scheduler(kind).config, **options)
    process = NoiseProcess.from_scheduler(scheduler)
    x, output = pair(torch.float32)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(50)
    expected = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
    mean, std = process.reverse_step(x, output, t, max(t - 20, -1), eta)
    assert torch.allclose(mean + std * z, expected, atol=2e-5, rtol=1e-5)
    assert bool((std > 0).all()) == (eta > 0 and not (alpha_one and t == 1))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_can_differ_within_a_batch(kind: str) -> None:
    process, (x, output) = make(kind), pair()
    t, t_next = torch.tensor([40, 500, 999]), torch.tensor([-1, 480, 20])
    mean, std = process.reverse_step(x, output, t, t_next, 1.0)
    for row in range(3):
        one = process.reverse_step(x[row : row + 1], output[row : row + 1], t[row].item(), t_next[row].item(), 1.0)
        assert torch.allclose(mean[row], one[0][0]) and torch.allclose(std[row], one[1][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_true_prediction_keeps_the_noise_level(kind: str, eta: float) -> None:
    """With the exact x0 and noise the step's total variance around alpha' x0 is sigma'^2, for any eta."""
    process, (x0, noise) = make(kind), pair()
    x_t = process.add_noise(x0, noise, 800)
    mean, std = process.reverse_step(x_t, process.target(x0, noise, 800), 800, 600, eta)
    coefficient = ((mean - process.alpha(600).double() * x0) / noise).mean()
    assert coefficient**2 + std.item() ** 2 == pytest.approx(process.sigma(600).item() ** 2, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_step_inverts_the_deterministic_step(kind: str) -> None:
    process, (x, output) = make(kind), pair()
    down, _ = process.reverse_step(x, output, 600, 400)
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
    with pytest.raises(PipelineError, match="use_dynamic_shifting"):
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(PipelineError, match="thresholds"):
        NoiseProcess.from_scheduler(DDIMScheduler(thresholding=True))
    with pytest.raises(PipelineError, match="steps must lie in 1..1000"):
        make("epsilon").timesteps(1001)
