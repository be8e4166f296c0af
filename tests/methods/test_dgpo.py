"""`dgpo`: groups that stay whole under one noise, the old policy, who samples, and resuming to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import build_tiny_sd
from tiny_rounds import collect, gradient, move, prompts, weights
from tiny_runs import losses, online_config

from mmalign.core.errors import UserError
from mmalign.methods.dgpo import DGPO, DGPOConfig
from mmalign.methods.run import Run
from mmalign.training.checkpoint import list_checkpoints, load_checkpoint
from mmalign.training.train import train
from pipelines import sample
from pipelines.noise import NoiseProcess

SMALL: dict[str, Any] = {"sampling_steps": 4, "images_per_prompt": 3, "levels": 2, "sampler_steps": [0, 3]}
DGPO_RUN: dict[str, Any] = {
    "name": "dgpo",
    **SMALL,
    "updates_per_round": 2,
    "old_decay": [0, 0.1, 0.3],
    "old_samples_after": 2,
    "reference_guidance": 2.0,
}


def make(run: Run | None = None, **options: Any) -> DGPO:
    method = DGPO(DGPOConfig(**{**SMALL, **options}))
    if run is not None:
        method.begin(run)
    return method


def test_the_old_policy_follows_every_update_and_draws_later(run: Run) -> None:
    method = make(run, old_decay=[0, 0.25, 0.9], old_samples_after=1)
    first = weights(run)
    for step, (before, decay) in enumerate([(first, 0.0), (None, 0.25)]):
        held = before or [one.clone() for one in method.old.shadow.values()]
        with torch.no_grad():
            for parameter in run.generator.trainable_parameters():
                parameter.mul_(1.3)
        assert run.step == step
        method.after_update(run)
        run.step += 1
        for old, past, now in zip(method.old.shadow.values(), held, weights(run), strict=True):
            torch.testing.assert_close(old, decay * past + (1 - decay) * now, rtol=1e-12, atol=0)
    by_old = collect(run, method)[0].latents  # step 2 > 1
    by_policy = collect(run, make(run, old_samples_after=2))[0].latents
    assert not torch.equal(by_old, by_policy)
    with method.old.applied():
        assert torch.equal(by_old, collect(run, make(run, old_samples_after=None))[0].latents)


def test_the_old_policy_is_the_policy_only_after_a_copy(run: Run) -> None:
    method = make(run, old_decay=[1, 0.25, 0.9])
    (batch, _) = collect(run, method)
    assert torch.equal(method._noised(run, batch, 0).policy, method._noised(run, batch, 0).old)
    for same in (True, True, False):  # decays 0, 0 and 0.25 after steps 0, 1 and 2
        with torch.no_grad():
            for parameter in run.generator.trainable_parameters():
                parameter.mul_(1.1)
        method.after_update(run)
        run.step += 1
        one = method._noised(run, batch, 0)
        assert torch.equal(one.policy, one.old) == same
        with torch.no_grad(), method.old.applied():
            again = run.predict(one.noised.x_t, one.noised.t, one.noised.cond)
        torch.testing.assert_close(one.old, again, rtol=1e-12, atol=1e-12)


def test_the_images_of_a_prompt_share_their_noise_and_all_share_the_level(run: Run) -> None:
    (batch, other) = collect(run, method := make(run))
    seen = []
    for level in range(2):
        one = method._noised(run, batch, level).noised
        noise = run.process.implied_noise(batch.latents, one.x_t, one.t).reshape(2, 3, -1)
        torch.testing.assert_close(noise, noise[:, :1].expand_as(noise), rtol=1e-6, atol=1e-6)
        assert (noise[0, 0] - noise[1, 0]).abs().max() > 0.1 and len(one.t.unique()) == 1
        assert one.t[0] == method._noised(run, other, level).noised.t[0]
        assert one.t[0].item() in batch.grid[:3].tolist()
        seen.append(one.t[0].item())
    assert seen[0] != seen[1]
    x = make(run, shared_noise=False)._noised(run, batch, 0).noised
    noise = run.process.implied_noise(batch.latents, x.x_t, x.t)
    assert (noise[0] - noise[1]).abs().max() > 0.1


@pytest.mark.parametrize(("compare_to", "guidance"), [("reference", 1.0), ("reference", 3.0), ("old", 3.0)])
def test_the_loss_by_loops(run: Run, compare_to: str, guidance: float) -> None:
    method = make(run, compare_to=compare_to, reference_guidance=guidance, beta=30.0, clip=1e-3, reference_weight=0.2)
    run.step = 1
    (batch, _) = collect(run, method)
    move(run)
    one = method._noised(run, batch, 1)
    noised, a = one.noised, batch.advantages.double().clamp(-5, 5)
    with run.reference.active():
        reference = run.generator.predict(noised.x_t, noised.t, noised.cond)
        empty = run.generator.unconditional().repeat_interleave(len(a))
        without = run.generator.predict(noised.x_t, noised.t, empty)
    reference = without + guidance * (reference - without)
    torch.testing.assert_close(one.reference, reference, rtol=1e-9, atol=1e-9)

    def error(v: torch.Tensor) -> torch.Tensor:
        return (v - noised.target).square().flatten(1).mean(1)

    now, old, compared = error(one.policy), error(one.old), error(one.old if compare_to == "old" else reference)
    total, held = 0.0, 0
    for group in range(2):
        rows = range(3 * group, 3 * group + 3)
        weight = torch.sigmoid(sum(a[i] * 30.0 * (now[i] - compared[i]) / 3 for i in rows)).item()
        for i in rows:
            ratio = float((old[i] - now[i]).exp())
            moved = ratio > 1.001 if a[i] > 0 else ratio < 0.999
            held += moved
            total = total + weight * a[i] * (now[i].detach() if moved else now[i]) / 6
    output = method.loss(run, one)
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=1e-12)
    assert output.metrics["clipped"] == pytest.approx(held / 6) and 0 < held < 6
    (ours,) = torch.autograd.grad(output.loss, one.policy, retain_graph=True)
    (theirs,) = torch.autograd.grad(total, one.policy)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


def test_mini_batches_keep_prompts_whole_and_add_up_to_the_round(run: Run) -> None:
    whole, cut = make(run, clip=None), make(run, clip=None, mini_batches=2)
    collected = collect(run, whole)
    steps = cut.split(run, collected)
    assert len(steps) == 2
    for part in (part for step in steps for part in step):
        names = [name.rpartition("/")[0] for name in part.samples.ids]
        assert all(names.count(name) == 3 for name in names) and names == sorted(names, key=names.index)
    (everything,) = whole.split(run, collected)
    expected = gradient(run, whole, list(everything))
    found = [gradient(run, cut, list(step)) for step in steps]
    for number, theirs in enumerate(expected):
        torch.testing.assert_close(sum(one[number] for one in found) / 2, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", [{"kind": "lora", "rank": 4}, pytest.param({"kind": "full"}, marks=pytest.mark.slow)])
def test_a_run_trains_and_is_resumed_to_the_bit(model: str, tmp_path: Path, kind: dict[str, Any]) -> None:
    def config(folder: str, steps: int) -> Any:
        options = {"steps": steps, "adapter": kind, "ema": 0.9, "precision": "bf16"}
        return online_config(model, tmp_path / folder, DGPO_RUN, **options)

    train(config("whole", 8))
    train(config("halves", 4))
    train(config("halves", 8))
    for key in ("loss", "grad_norm", "distance", "old_distance", "clipped", "reward"):
        assert losses(tmp_path / "whole", key) == losses(tmp_path / "halves", key), key
    moved = losses(tmp_path / "whole", "old_distance")
    assert moved[1] == moved[2] == 0 and all(moved[step] > 0 for step in range(3, 9))
    ends = [load_checkpoint(list_checkpoints(tmp_path / one / "checkpoints")[-1]) for one in ("whole", "halves")]
    for group in ("weights", "ema", "method", "optimizer"):
        for name, value in ends[0].tensors[group].items():
            assert torch.equal(value, ends[1].tensors[group][name]), (group, name)
    old = ends[0].tensors["method"]
    assert any(not torch.equal(value, old[name]) for name, value in ends[0].tensors["weights"].items())


def test_a_small_step_puts_a_group_in_order(run: Run) -> None:
    """A step against the gradient lowers the mean of A l."""
    method = make(run, reference_weight=0.0, clip=None)
    (batch, _) = collect(run, method)

    def order() -> float:
        found = [method._noised(run, batch, level) for level in range(2)]
        gains = [
            (one.advantages * (one.policy - one.noised.target).square().flatten(1).mean(1)).mean() for one in found
        ]
        return float(sum(gains))

    before, slope = order(), gradient(run, method, [batch])
    size = sum(float(one.square().sum()) for one in slope) ** 0.5
    with torch.no_grad():
        for parameter, one in zip(run.generator.trainable_parameters(), slope, strict=True):
            parameter -= 1e-3 / size * one
    assert order() < before


def test_a_flow_model_is_trained_by_the_same_lines(run: Run) -> None:
    run.generator.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    method = make(run)
    method.check(run.process)
    (batch, _) = collect(run, method)
    expected = sample(
        run.generator,
        prompts(run, "a red circle", "a star").repeat(3).cond,
        steps=4,
        guidance=1.0,
        seeds=run.seeds(batch.samples.ids, 0),
    ).latents
    torch.testing.assert_close(batch.latents, expected)
    assert any(float(found.abs().max()) > 0 for found in gradient(run, method, [batch]))


def test_models_that_predict_noise_are_refused(tmp_path: Path) -> None:
    noise = build_tiny_sd(tmp_path / "epsilon")
    with pytest.raises(UserError, match="dgpo is for models that predict a velocity"):
        train(online_config(noise, tmp_path / "out", DGPO_RUN))


def test_guidance_of_a_reference_that_nothing_uses_is_refused() -> None:
    unused = {"compare_to": "old", "reference_weight": 0.0}
    with pytest.raises(ValueError, match="reference_guidance changes nothing"):
        DGPOConfig(**unused, reference_guidance=4.5)
    assert DGPOConfig(**unused).reference_guidance == 1


def test_the_published_constants_are_the_defaults() -> None:
    c = DGPOConfig()
    assert (c.sampling_steps, c.images_per_prompt, c.levels, c.sampler_steps) == (10, 24, 4, (0, 7))
    assert (c.beta, c.clip, c.reference_weight, c.advantage_clip, c.old_samples_after) == (100.0, 1e-2, 0.02, 5.0, 200)
    assert c.decay() == {"flat": 0, "rate": 0.001, "limit": 0.3}
