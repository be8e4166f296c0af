"""`nft`: the old policy, the noise levels, the round, runs of tiny models, and resuming to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import build_tiny_sd
from tiny_rounds import collect, gradient, move, weights
from tiny_runs import losses, online_config

from mmalign.core.errors import UserError
from mmalign.losses.advantages import Spread, group_advantages
from mmalign.methods.nft import NFT, NFTConfig
from mmalign.methods.run import Run
from mmalign.training.checkpoint import list_checkpoints, load_checkpoint
from mmalign.training.train import train
from pipelines.flow import Density
from pipelines.noise import NoiseProcess

SMALL: dict[str, Any] = {"sampling_steps": 3, "images_per_prompt": 3, "levels": 2}
NFT_RUN: dict[str, Any] = {"name": "nft", **SMALL, "updates_per_round": 2, "old_decay": [0, 0.1, 0.5]}


def make(run: Run | None = None, **options: Any) -> NFT:
    method = NFT(NFTConfig(**{**SMALL, **options}))
    if run is not None:
        method.begin(run)
    return method


def test_advantages_are_those_of_the_groups_over_the_spread_of_the_round(run: Run) -> None:
    drawn = collect(run, make(run))
    rewards = torch.cat([one.rewards for one in drawn])
    groups = rewards.reshape(4, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    found = torch.cat([one.advantages for one in drawn])
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-5, atol=1e-6)
    own = group_advantages([p for one in drawn for p in one.samples.prompts], rewards, spread=Spread("group"))
    each = torch.cat([one.advantages for one in collect(run, make(run, advantage_std="group"))])
    torch.testing.assert_close(each, own)


def test_the_old_policy_draws_and_follows_once_a_round(run: Run) -> None:
    method = make(run, old_decay=[1, 0.25, 0.9])
    start = weights(run)
    first = collect(run, method)
    move(run)
    moved = weights(run)
    second = collect(run, method)  # step 1: d = (1 - 1) * 0.25 = 0, a copy of the policy
    assert all(map(torch.equal, method.old.shadow.values(), moved))
    move(run, 0.5)
    move(run, 1.0)
    collect(run, method)  # step 3: d = 0.5
    now = weights(run)
    for old, before, present in zip(method.old.shadow.values(), moved, now, strict=True):
        torch.testing.assert_close(old, 0.5 * before + 0.5 * present, rtol=1e-12, atol=0)
    assert not torch.equal(first[0].latents, second[0].latents)
    # The samples are those of a model whose weights are the old policy's, and the policy keeps its own.
    again = make(run, old_decay="copy")
    for parameter, old in zip(run.generator.trainable_parameters(), start, strict=True):
        parameter.data.copy_(old)
    run.step = 0
    assert torch.equal(collect(run, again)[0].latents, first[0].latents)


def test_policy_and_old_policy_see_the_same_noise_at_levels_of_their_own_parts(run: Run) -> None:
    method = make(run, levels=4, timesteps=[0.2, 1.0])
    (batch, _) = collect(run, method)
    move(run)
    seen = [method._noised(run, batch, level) for level in range(4)]
    for level, one in enumerate(seen):
        assert ((200 * level + 200 <= one.noised.t) & (one.noised.t < 200 * level + 400)).all()
        assert len(one.noised.t.unique()) > 1
        policy = run.predict(one.noised.x_t, one.noised.t, one.noised.cond)
        torch.testing.assert_close(one.policy, policy)
        assert one.policy.requires_grad and not one.old.requires_grad
        assert (one.old - policy).abs().max() > 1e-4
        clean = run.process.to_x0(one.noised.x_t, one.noised.target, one.noised.t)
        torch.testing.assert_close(clean, batch.latents, rtol=1e-9, atol=1e-9)
    move(run, 1.0)
    assert not torch.equal(method._noised(run, batch, 0).noised.t, seen[0].noised.t)  # drawn afresh at every update


def test_before_the_first_update_the_old_policy_is_the_policy(run: Run) -> None:
    (batch, _) = collect(run, method := make(run))
    one = method._noised(run, batch, 0)
    assert torch.equal(one.policy, one.old)
    with torch.no_grad(), method.old.applied():
        again = run.predict(one.noised.x_t, one.noised.t, one.noised.cond)
    torch.testing.assert_close(one.old, again, rtol=1e-12, atol=1e-12)


def test_the_levels_of_the_sampler_are_a_permutation_of_its_own(run: Run) -> None:
    method = make(run, levels=2, level_grid="sampler")
    (batch, _) = collect(run, method)
    levels = torch.stack([method._noised(run, batch, level).noised.t for level in range(2)])
    grid = batch.grid.tolist()
    assert len(grid) == 3 and set(levels.flatten().tolist()) <= set(grid)
    assert (levels[0] != levels[1]).all() and len(levels[0].unique()) > 1


def test_gradient_of_the_network_equals_finite_differences(run: Run) -> None:
    method = make(run, reference_weight=0.3, normalise=False)
    (batch, _) = collect(run, method)
    move(run)
    parameter = run.generator.trainable_parameters()[1]
    (_ := gradient(run, method, [batch]))
    assert parameter.grad is not None
    index = int(parameter.grad.abs().argmax())
    found, values = float(2 * parameter.grad.flatten()[index]), []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.view(-1)[index] += shift
            values.append(float(method.learn(run, batch, lambda loss: None)["loss"]))
            parameter.view(-1)[index] -= shift
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_mini_batches_add_up_to_the_round(run: Run) -> None:
    whole, cut = make(run), make(run, mini_batches=3)
    collected = collect(run, whole)
    move(run)
    cut.old.restore(whole.old.shadow)
    (everything,) = whole.split(run, collected)
    steps = cut.split(run, collected)
    assert len(steps) == 3 == cut.updates_per_round
    ids = sorted(name for step in steps for part in step for name in part.samples.ids)
    assert ids == sorted(name for one in collected for name in one.samples.ids)
    expected = gradient(run, whole, list(everything))
    found = [gradient(run, cut, list(step)) for step in steps]
    for number, theirs in enumerate(expected):
        torch.testing.assert_close(sum(one[number] for one in found) / 3, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", [{"kind": "lora", "rank": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_a_run_trains_and_is_resumed_to_the_bit(model: str, tmp_path: Path, kind: dict[str, Any]) -> None:
    """Policy, old policy and average; the old policy is neither of the others."""

    def config(folder: str, steps: int) -> Any:
        options = {"steps": steps, "adapter": kind, "ema": 0.9, "precision": "bf16"}
        return online_config(model, tmp_path / folder, NFT_RUN, **options)

    train(config("whole", 6))
    train(config("halves", 4))
    train(config("halves", 6))
    for key in ("loss", "grad_norm", "distance", "old_distance", "reward"):
        assert losses(tmp_path / "whole", key) == losses(tmp_path / "halves", key), key
    assert set(losses(tmp_path / "whole", "reward")) == {1, 3, 5}  # of the samples, once a round
    moved = losses(tmp_path / "whole", "old_distance")
    assert moved[1] == 0 and all(moved[step] > 0 for step in (2, 3, 4, 5, 6))
    ends = [load_checkpoint(list_checkpoints(tmp_path / one / "checkpoints")[-1]) for one in ("whole", "halves")]
    for group in ("weights", "ema", "method", "optimizer"):
        for name, value in ends[0].tensors[group].items():
            assert torch.equal(value, ends[1].tensors[group][name]), (group, name)
    weights, old, average = (ends[0].tensors[group] for group in ("weights", "method", "ema"))
    assert weights.keys() == old.keys() == average.keys()
    name = max(weights, key=lambda one: float((weights[one] - old[one]).abs().max()))
    assert not torch.equal(weights[name], old[name]) and not torch.equal(average[name], old[name])


def test_a_checkpoint_that_lost_its_old_policy_is_said(model: str, tmp_path: Path) -> None:
    train(online_config(model, tmp_path, NFT_RUN, steps=2))
    (tmp_path / "checkpoints" / "step_00000002" / "method.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged"):
        train(online_config(model, tmp_path, NFT_RUN, steps=4))


def test_a_flow_model_is_trained_by_the_same_lines(run: Run) -> None:
    """Euler's steps; errors of the clean sample are sigma times those of the velocity noise - x0."""
    run.generator.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    method = make(run, normalise=False)
    method.check(run.process)
    (batch, _) = collect(run, method)
    assert batch.grid.tolist() == run.process.timesteps(3).tolist()
    move(run)
    one = method._noised(run, batch, 1)
    sigma = one.noised.t.double() / 1000
    torch.testing.assert_close(one.sigma.double(), sigma, rtol=1e-6, atol=0)
    levels = sigma.reshape(-1, 1, 1, 1)
    x0 = one.noised.x_t - levels * one.noised.target
    torch.testing.assert_close(x0, batch.latents, rtol=1e-6, atol=1e-6)
    assert any(float(found.abs().max()) > 0 for found in gradient(run, method, [batch]))


def test_equal_rewards_hold_the_policy_where_it_is(run: Run) -> None:
    method = make(run, reference_weight=0.0)
    drawn = [replace(one, advantages=torch.zeros_like(one.advantages)) for one in collect(run, method)]
    assert all(float(one.abs().max()) < 1e-12 for one in gradient(run, method, drawn))
    logged = method.learn(run, drawn[0], lambda loss: None)
    assert logged["flat"] == 1.0


def test_the_loss_is_the_objective_times_the_clip(run: Run) -> None:
    (batch, _) = collect(run, method := make(run, advantage_clip=2.0, advantage_mode="binary", beta=0.5))
    move(run)
    one = method._noised(run, batch, 0)
    half = replace(one, advantages=torch.zeros_like(one.advantages))
    sigma = one.sigma.reshape(-1, 1, 1, 1)
    moved = 0.5 * (one.policy - one.old)
    sides = [sigma * (one.old + sign * moved - one.noised.target) for sign in (1, -1)]
    each = [side.square().flatten(1).mean(1) / side.abs().flatten(1).mean(1) for side in sides]
    expected = 2.0 * ((each[0] + each[1]) / 2 / 0.5).mean()
    torch.testing.assert_close(method.loss(run, half).loss, expected, rtol=1e-6, atol=0)


def test_models_that_predict_noise_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    noise = build_tiny_sd(tmp_path / "epsilon")
    shutil.rmtree(tmp_path / "epsilon" / "text_encoder")
    with pytest.raises(UserError, match="predict a velocity .* this one predicts epsilon: .*choose ddpo or prdp"):
        train(online_config(noise, tmp_path / "out", NFT_RUN))


def test_levels_of_the_sampler_survive_a_written_config() -> None:
    config = NFTConfig(level_grid="sampler", levels=5)
    assert NFTConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level_grid": "sampler", "levels": 9}, "levels 9 of level_grid: sampler are more than sampling_steps 3"),
        ({"level_grid": "sampler", "timesteps": [0.0, 0.5]}, "timesteps is for level_grid: schedule"),
        ({"old_decay": [0, 0.1, 1.0]}, "limit=1.0"),
        ({"images_per_prompt": 1}, "greater than or equal to 2"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_what_the_process_does_not_have_is_refused() -> None:
    flow = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())
    make(solver="dpm++").check(flow)
    with pytest.raises(UserError, match="levels 9 are more than the 5 levels"):
        make(levels=9, timesteps=[0, 5]).check(flow)
    flow.set_density(Density("logit_normal"))
    with pytest.raises(UserError, match="flow.density logit_normal: .* set method.levels: 1"):
        make(levels=9).check(flow)
    make(levels=1).check(flow)


def test_the_published_constants_are_the_defaults() -> None:
    c = NFTConfig()
    assert (c.sampling_steps, c.images_per_prompt, c.levels, c.guidance) == (10, 24, 9, 1.0)
    assert (c.beta, c.advantage_clip, c.reference_weight, c.advantage_std) == (1.0, 5.0, 1e-4, "batch")
    assert c.decay() == {"flat": 0, "rate": 0.001, "limit": 0.5}
    assert NFTConfig(old_decay="late").decay() == {"flat": 75, "rate": 0.0075, "limit": 0.999}
    assert json.loads(c.model_dump_json())["old_decay"] == "slow"
