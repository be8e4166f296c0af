"""Densities of training levels, against diffusers' training scripts and closed forms; grids of flow models."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from pipelines import PipelineError
from pipelines.flow import Density
from pipelines.noise import FlowProcess, NoiseProcess


def make(**options: object) -> FlowProcess:
    process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(**options))
    assert isinstance(process, FlowProcess)
    return process


@pytest.mark.parametrize(
    ("density", "scheme"),
    [
        (Density(), {"weighting_scheme": "none"}),
        (Density("logit_normal"), {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}),
        (
            Density("logit_normal", -0.7, 0.5),
            {"weighting_scheme": "logit_normal", "logit_mean": -0.7, "logit_std": 0.5},
        ),
        (Density("mode"), {"weighting_scheme": "mode", "mode_scale": 1.29}),
        (Density("mode", scale=-0.8), {"weighting_scheme": "mode", "mode_scale": -0.8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=["static", "by size"])
def test_levels_are_drawn_as_by_diffusers_scripts(
    density: Density, scheme: dict[str, object], options: dict[str, object]
) -> None:
    scheduler, draws = FlowMatchEulerDiscreteScheduler(**options), 40_000
    random = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(batch_size=draws, generator=random, **scheme)  # type: ignore[arg-type]
    theirs = scheduler.timesteps[(u * 1000).long().clamp_max(999)]
    process = make(**options)
    process.set_density(density)
    ours = process.sample_timesteps(draws, generator=torch.Generator().manual_seed(1))
    edges = torch.linspace(0, 1000, 21)
    shares = [torch.histogram(t.float().cpu(), edges).hist / draws for t in (ours, theirs)]
    # Each share has a standard error of at most sqrt(p / n); 5 of the two together.
    assert bool(((shares[0] - shares[1]).abs() <= 5 * (2 * shares[1].clamp_min(1e-4) / draws).sqrt()).all())


def test_logit_normal_is_its_closed_form() -> None:
    """P(a < u <= b) of u = sigmoid(N(m, s)), and u counts from noise: levels are counted from clean."""
    normal = NormalDist(-0.5, 0.8)
    weights = Density("logit_normal", -0.5, 0.8).weights(1000)
    for low, high in ((0.1, 0.2), (0.45, 0.7), (0.0, 0.05)):
        ends = [0.0 if u == 0.0 else normal.cdf(math.log(u / (1 - u))) for u in (low, high)]
        levels = slice(round(1000 * (1 - high)), round(1000 * (1 - low)))
        assert float(weights[levels].sum()) == pytest.approx(ends[1] - ends[0], abs=1e-12)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(weights[500:].sum()) > 0.7  # a mean below 0 prefers noisy levels


def test_a_density_of_a_part_of_the_levels_is_the_conditional_one() -> None:
    process = make(shift=1.0)
    process.set_density(Density("logit_normal"))
    drawn = process.sample_timesteps(20_000, generator=torch.Generator().manual_seed(0), low=800, high=900)
    assert 801 <= drawn.min() and drawn.max() <= 900
    weights = Density("logit_normal").weights(1000)[800:900]
    assert float((drawn <= 850).float().mean()) == pytest.approx(float(weights[:50].sum() / weights.sum()), abs=0.02)
    process.set_density(Density("logit_normal", 0.0, 0.01))
    with pytest.raises(PipelineError, match=r"no level in 0\.\.9 a weight"):
        process.sample_timesteps(1, low=0, high=10)


def test_uniform_draws_stay_what_they_were_to_the_bit() -> None:
    process = make(shift=3.0)
    before = process.sample_timesteps(50, generator=torch.Generator().manual_seed(3))
    process.set_density(Density("mode"))
    process.set_density(Density())
    assert torch.equal(before, process.sample_timesteps(50, generator=torch.Generator().manual_seed(3)))


def test_even_levels_are_those_of_fluxs_pipeline() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    process = make(use_dynamic_shifting=True, shift_terminal=0.02)
    process.even_sigmas, process.mu = True, 0.8
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    assert torch.equal(process.schedule(4).levels, scheduler.timesteps)
    assert process.schedule(4).levels[-1].item() == pytest.approx(20.0, rel=1e-4)


def test_one_step_cannot_end_at_a_terminal_level() -> None:
    process = make(use_dynamic_shifting=True, shift_terminal=0.02)
    process.even_sigmas, process.mu = True, 0.8
    with pytest.raises(PipelineError, match=r"ends its levels at 0.02 \(shift_terminal\).*take 2 steps or more"):
        process.schedule(1)


def test_a_solver_along_a_flow_is_the_flow_that_it_samples() -> None:
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    process = NoiseProcess.from_scheduler(solver)
    assert isinstance(process, FlowProcess) and process.prediction == "flow"
    solver.set_timesteps(10)
    torch.testing.assert_close(process.schedule(10).levels, solver.timesteps.float(), rtol=0, atol=2.0)
    assert process.schedule(4).levels.tolist() == pytest.approx([1000, 900, 750, 500])  # 3 s / (1 + 2 s)


@pytest.mark.parametrize("option", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
def test_levels_that_a_solver_places_otherwise_are_refused(option: dict[str, bool]) -> None:
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **option)
    with pytest.raises(PipelineError, match=f"use_flow_sigmas with {next(iter(option))}, which is not supported"):
        NoiseProcess.from_scheduler(solver)


def test_the_log_says_which_grid() -> None:
    fixed, by_size = make(shift=3.0), make(use_dynamic_shifting=True)
    by_size.mu = 0.63
    for process in (fixed, by_size):
        process.set_density(Density("logit_normal", 0.0, 1.0))
    assert fixed.describe() == "sampling levels shifted by 3; training levels logit_normal(0, 1) on that grid"
    assert by_size.describe() == (
        "sampling levels shifted by size, mu 0.63; training levels logit_normal(0, 1) on the unshifted grid"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "logitnormal"}, "density 'logitnormal' is unknown; allowed: uniform, logit_normal, mode"),
        ({"kind": "logit_normal", "std": 0.0}, "needs a std above 0"),
        ({"kind": "mode", "scale": 2.0}, r"scale in -1\.\.1.75, got 2.0"),
    ],
)
def test_impossible_densities_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Density(**options)  # type: ignore[arg-type]
