"""`awm`: who samples, what holds the policy, the ratio, the noise levels, and resuming to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import build_tiny_sd
from tiny_rounds import collect, gradient, move, weights
from tiny_runs import losses, online_config

from mmalign.core.errors import UserError
from mmalign.losses import awm_log_prob
from mmalign.methods.awm import AWM, AWMConfig
from mmalign.methods.run import Run
from mmalign.training.checkpoint import list_checkpoints, load_checkpoint
from mmalign.training.train import train
from pipelines.noise import NoiseProcess

SMALL: dict[str, Any] = {"sampling_steps": 4, "images_per_prompt": 3, "levels": 2, "sampler_steps": [1, 4]}
AWM_RUN: dict[str, Any] = {"name": "awm", **SMALL, "updates_per_round": 2, "old_decay": [0, 0.1, 0.3], "power": 0.5}


def make(run: Run | None = None, **options: Any) -> AWM:
    method = AWM(AWMConfig(**{**SMALL, **options}))
    if run is not None:
        method.begin(run)
    return method


def test_the_policy_draws_and_the_anchor_follows_once_a_round(run: Run) -> None:
    method = make(run, old_decay=[0, 0.25, 0.9])
    start = weights(run)
    collect(run, method)  # step 0: d = 0
    move(run)
    moved = weights(run)
    drawn = collect(run, method)  # step 1: d = 0.25
    for anchor, before, now in zip(method.old.shadow.values(), start, moved, strict=True):
        torch.testing.assert_close(anchor, 0.25 * before + 0.75 * now, rtol=1e-12, atol=0)
    again = make(run)  # whose policy has the same weights, and whose old policy others
    assert torch.equal(collect(run, again)[0].latents, drawn[0].latents)


@pytest.mark.parametrize("updates", [1, 2])
def test_before_the_first_update_the_gradient_is_advantage_weighted_denoising(run: Run, updates: int) -> None:
    method = make(run, anchor_weight=0.0, reference_weight=0.0, weighting="t", updates_per_round=updates, levels=1)
    (batch, _) = collect(run, method)
    found = gradient(run, method, [batch])
    one = method._noised(run, batch, 0)
    error = (one.policy - one.noised.target).square().flatten(1).mean(1)
    parameters = run.generator.trainable_parameters()
    objective = (batch.advantages.clamp(-5, 5) / 5 * one.sigma * error).mean() / 2
    expected = torch.autograd.grad(objective, parameters, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-5, atol=1e-12)
    assert any(float(ours.abs().max()) > 0 for ours in found)


def test_later_updates_compare_with_the_policy_that_drew_the_samples(run: Run) -> None:
    method = make(run, updates_per_round=2, old_decay=[0, 0.5, 0.9], clip=0.01, weighting="uniform")
    run.step = 1
    (batch, _) = collect(run, method)
    drew = weights(run)
    move(run)
    one = method._noised(run, batch, 0)
    now = awm_log_prob(one.policy, one.noised.target, one.sigma, weighting="uniform")
    kept = weights(run)
    for parameter, value in zip(run.generator.trainable_parameters(), drew, strict=True):
        parameter.data.copy_(value)
    velocity = run.predict(one.noised.x_t, one.noised.t, one.noised.cond)
    old = awm_log_prob(velocity, one.noised.target, one.sigma, weighting="uniform")
    for parameter, value in zip(run.generator.trainable_parameters(), kept, strict=True):
        parameter.data.copy_(value)
    ratio, a = (now - old).exp(), batch.advantages.double().clamp(-5, 5) / 5
    assert (ratio - 1).abs().max() > 1e-3
    gain = torch.maximum(-a * ratio, -a * ratio.clamp(0.99, 1.01)).mean()
    anchor = (one.policy - one.old).square().mean()
    output = method.loss(run, one)
    torch.testing.assert_close(output.loss, gain + anchor, rtol=1e-5, atol=1e-12)
    assert output.metrics["clipped"] == ((ratio - 1).abs() > 0.01).float().mean()


def test_gradient_of_the_network_equals_finite_differences(run: Run) -> None:
    method = make(run, reference_weight=0.3, anchor_weight=0.7, updates_per_round=2)
    (batch, _) = collect(run, method)
    move(run)
    parameter = run.generator.trainable_parameters()[1]
    gradient(run, method, [batch])
    assert parameter.grad is not None
    index = int(parameter.grad.abs().argmax())
    found, values = float(2 * parameter.grad.flatten()[index]), []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.view(-1)[index] += shift
            values.append(float(method.learn(run, batch, lambda loss: None)["loss"]))
            parameter.view(-1)[index] -= shift
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_all_images_may_have_one_level_of_each_part_of_the_sampler_s_steps(run: Run) -> None:
    """The published parts of 14 steps: 1, 2 to 3, 4 to 5, 6 to 7, 8 to 9, 10 to 11."""
    method = make(run, sampling_steps=14, levels=6, sampler_steps=[1, 12], shared_levels=True)
    first, second = collect(run, method)
    grid, seen = first.grid.tolist(), []
    assert len(grid) == 14
    for level, steps in enumerate(([1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11])):
        t = method._noised(run, first, level).noised.t.unique()
        assert len(t) == 1 and t.item() in [grid[step] for step in steps]
        assert torch.equal(t, method._noised(run, second, level).noised.t.unique())
        seen.append(t.item())
    others = set()
    for run.step in range(1, 6):
        others.add(tuple(method._noised(run, first, level).noised.t[0].item() for level in range(6)))
    assert len(others | {tuple(seen)}) > 3
    run.step = 0
    own = make(run, sampling_steps=14, levels=6, sampler_steps=[1, 12])
    assert len(own._noised(run, first, 3).noised.t.unique()) == 2


@pytest.mark.parametrize("kind", [{"kind": "lora", "rank": 4}, pytest.param({"kind": "full"}, marks=pytest.mark.slow)])
def test_a_run_trains_and_is_resumed_to_the_bit(model: str, tmp_path: Path, kind: dict[str, Any]) -> None:
    """Policy, anchor, and the policy that drew the samples."""

    def config(folder: str, steps: int) -> Any:
        options = {"steps": steps, "adapter": kind, "ema": 0.9, "precision": "bf16"}
        return online_config(model, tmp_path / folder, AWM_RUN, **options)

    train(config("whole", 6))
    train(config("halves", 4))
    train(config("halves", 6))
    for key in ("loss", "grad_norm", "distance", "old_distance", "reward"):
        assert losses(tmp_path / "whole", key) == losses(tmp_path / "halves", key), key
    moved = losses(tmp_path / "whole", "old_distance")
    assert moved[1] == 0 and all(moved[step] > 0 for step in (2, 3, 4, 5, 6))
    ends = [load_checkpoint(list_checkpoints(tmp_path / one / "checkpoints")[-1]) for one in ("whole", "halves")]
    for group in ("weights", "ema", "method", "optimizer"):
        for name, value in ends[0].tensors[group].items():
            assert torch.equal(value, ends[1].tensors[group][name]), (group, name)
    anchor = ends[0].tensors["method"]
    assert any(not torch.equal(value, anchor[name]) for name, value in ends[0].tensors["weights"].items())


def test_a_flow_model_is_trained_by_the_same_lines(run: Run) -> None:
    run.generator.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    method = make(run)
    method.check(run.process)
    (batch, _) = collect(run, method)
    assert any(float(found.abs().max()) > 0 for found in gradient(run, method, [batch]))


def test_models_that_predict_noise_are_refused(tmp_path: Path) -> None:
    noise = build_tiny_sd(tmp_path / "epsilon")
    with pytest.raises(UserError, match="awm is for models that predict a velocity"):
        train(online_config(noise, tmp_path / "out", AWM_RUN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_steps": [1, 9]}, r"sampler_steps \[1, 9\] must satisfy 0 <= first < end <= sampling_steps 4"),
        ({"levels": 4}, "levels 4 of level_grid: sampler_parts are more than the number of sampler_steps, 3"),
        ({"level_grid": "schedule"}, "sampler_steps is for level_grid: .*; set sampler_steps: null"),
        ({"timesteps": [0.0, 0.5]}, "timesteps is for level_grid: schedule"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_published_constants_are_the_defaults() -> None:
    c = AWMConfig()
    assert (c.sampling_steps, c.images_per_prompt, c.levels, c.guidance) == (14, 24, 6, 1.0)
    assert (c.weighting, c.power, c.clip, c.advantage_clip, c.advantage_std) == ("ghuber", 0.25, 1.0, 5.0, "batch")
    assert (c.reference_weight, c.anchor_weight, c.sampler_steps) == (1e-3, 1.0, (1, 12))
    assert c.decay() == {"flat": 0, "rate": 0.001, "limit": 0.3}
