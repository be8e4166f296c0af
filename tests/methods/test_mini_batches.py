"""Rounds that are cut into mini-batches: nothing lost, nothing twice, and gradients that add up to the round's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import Brightness, exact_run, losses, online_config
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.batches import PromptBatch
from mmalign.methods import methods
from mmalign.methods.base import Method
from mmalign.methods.mini_batches import places, shuffled_parts
from mmalign.methods.run import Run
from mmalign.scoring.choice import WeightedReward
from mmalign.training.train import plan, train

DDPO = {"sampling_steps": 3, "guidance": 1.0, "images_per_prompt": 4, "advantage": "group", "clip": 0.5}
PRDP = {"sampling_steps": 3, "guidance": 1.0, "images_per_prompt": 2, "beta": 1.0, "clip": 0.5, "updates_per_round": 1}
SPO: dict[str, Any] = {"sampling_steps": 4, "guidance": 1.0, "candidates": 3, "clip": 0.9, "images_per_prompt": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("rounds") / "sd", vae="tiny")


@pytest.fixture
def run(model: str) -> Run:
    return exact_run(model, rewards=[WeightedReward("brightness", 1.0, Brightness())])


def make(name: str, **options: Any) -> Method[Any]:
    chosen = methods.get(name)
    method: Method[Any] = chosen(chosen.Config(**options))
    return method


def prompts(run: Run, *texts: str) -> PromptBatch:
    return PromptBatch(list(texts), run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])


def round_of(run: Run, method: Method[Any]) -> list[Any]:
    """Two micro-batches of two prompts; the policy has moved on since, so that no ratio is 1."""
    batches = [prompts(run, "a red circle", "a star"), prompts(run, "two blue squares", "red")]
    collected = list(method.collect(run, batches))
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.mul_(1.2)
    run.step = 1
    return collected


def gradient(run: Run, method: Method[Any], step: Any) -> list[Tensor]:
    """The gradient of one optimiser step as the loop takes it: a mean over two micro-batches."""
    parameters = run.generator.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for batch in step:
        method.learn(run, batch, lambda loss: (loss / 2).backward())
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def test_parts_hold_everything_once_and_differ_by_one_at_most() -> None:
    parts = shuffled_parts(11, 3, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(11)) and [len(part) for part in parts] == [4, 4, 3]
    owner, number = places([2, 0, 3])
    assert owner.tolist() == [0, 0, 2, 2, 2] and number.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "options", "unit"), [("ddpo", DDPO, 1), ("prdp", PRDP, 2)], ids=["single images", "images of a prompt"]
)
def test_mini_batches_add_up_to_the_round(run: Run, name: str, options: dict[str, Any], unit: int) -> None:
    """With the policy held still, the mean of the gradients of equal mini-batches is that of the whole round."""
    whole, cut = make(name, **options), make(name, **options, mini_batches=4)
    collected = round_of(run, whole)
    (everything,) = whole.split(run, collected)
    expected = gradient(run, whole, everything)
    steps = cut.split(run, collected)
    assert len(steps) == cut.updates_per_round == 4
    ids = [sorted(name for part in step for name in part.samples.ids) for step in steps]
    assert sorted(sum(ids, [])) == sorted(name for rollout in collected for name in rollout.samples.ids)
    if unit > 1:  # the images of a prompt stay together
        assert all(len({name.rsplit("/", 1)[0] for name in step}) == len(step) // unit for step in ids)
    found = [gradient(run, cut, step) for step in steps]
    for index, theirs in enumerate(expected):
        ours = torch.stack([one[index] for one in found]).mean(0)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    assert any(float(one.abs().max()) > 0 for one in expected)


def test_every_pass_is_shuffled_anew_and_the_first_one_logs_rewards(run: Run) -> None:
    method = make("ddpo", **DDPO, mini_batches=2, updates_per_round=2)
    collected = round_of(run, method)
    steps = method.split(run, collected)
    orders = [[name for part in step for name in part.samples.ids] for step in steps]
    assert len(steps) == 4 and set(orders[0] + orders[1]) == set(orders[2] + orders[3])
    assert set(orders[0]) not in (set(orders[2]), set(orders[3]))
    logged = [method.learn(run, step[0], lambda loss: None) for step in steps]
    assert ["reward" in metrics for metrics in logged] == [True, True, False, False]
    assert [len(step) for step in method.split(run, collected)] == [len(step) for step in steps]  # and repeatable
    with pytest.raises(UserError, match="mini_batches 99: a round has 16 images on each process"):
        make("ddpo", **DDPO, mini_batches=99).split(run, collected)


def pairs_of(method: Method[Any], run: Run) -> list[Any]:
    """A round of step pairs of which, chain by chain, some do not count."""
    collected = round_of(run, method)
    for number, pairs in enumerate(collected):
        pairs.valid = torch.tensor([(number + chain) % 3 > 0 for chain in range(len(pairs.valid))])
    return collected


def test_spo_drops_shuffles_and_takes_as_many_steps_as_its_pairs_fill(run: Run) -> None:
    method = make("spo", **SPO, threshold=(0.0, 0.0), mini_batch_size=5)
    collected = pairs_of(method, run)
    kept = sum(int(pairs.valid.sum()) for pairs in collected)
    steps = method.split(run, collected)
    assert len(steps) == -(-kept // 5) > 2
    sizes = [sum(len(part.valid) for part in step) for step in steps]
    assert sum(sizes) == kept and max(sizes) - min(sizes) <= 1
    assert all(bool(part.valid.all()) for step in steps for part in step)
    # Every pair that counts is there once: found again by its state.
    states = [part.step.state[row] for step in steps for part in step for row in range(len(part.valid))]
    there = [pairs.step.state[row] for pairs in collected for row in pairs.valid.nonzero().flatten().tolist()]
    assert sorted(float(one.sum()) for one in states) == pytest.approx(sorted(float(one.sum()) for one in there))
    assert len({float(level) for part in steps[0] for level in part.step.t}) > 1  # steps of the sampling are mixed
    metrics = method.learn(run, steps[0][0], lambda loss: None)
    assert metrics["valid"] == pytest.approx(kept / sum(len(pairs.valid) for pairs in collected))


@pytest.mark.parametrize("segment", [0, 1])
def test_spo_gradients_of_mini_batches_weigh_every_pair_alike(run: Run, segment: int) -> None:
    """The sum over mini-batches, each times its size, is the sum over pairs as each is computed by itself."""
    options = {**SPO, "threshold": (0.0, 0.0), "segment": segment}
    whole, cut = make("spo", **options), make("spo", **options, mini_batches=3)
    collected = pairs_of(whole, run)
    found: list[Tensor] | None = None
    for step in cut.split(run, collected):
        size = sum(len(part.valid) for part in step)
        scaled = [size * one for one in gradient(run, cut, step)]
        found = scaled if found is None else [a + b for a, b in zip(found, scaled, strict=True)]
    # Undivided, a step of n sampling steps gives each pair of its 4 chains the weight 1 / (2 micro-batches x n x 4).
    (everything,) = whole.split(run, collected)
    weight = 2 * len(collected) // 2 * 4
    assert found is not None
    for ours, theirs in zip(found, gradient(run, whole, everything), strict=True):
        torch.testing.assert_close(ours, weight * theirs, rtol=1e-6, atol=1e-12)


def test_a_round_without_a_pair_that_counts_is_one_empty_step(run: Run) -> None:
    method = make("spo", **SPO, threshold=(0.0, 0.0), mini_batch_size=5)
    collected = round_of(run, method)
    for pairs in collected:
        pairs.valid = torch.zeros_like(pairs.valid)
    assert method.split(run, collected) == [[]]


def test_both_ways_to_cut_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="mini_batch_size 5 and mini_batches 2: give one"):
        make("spo", mini_batch_size=5, mini_batches=2)


ROUNDS = {
    "ddpo": {"name": "ddpo", **DDPO, "clip": 1e-4, "mini_batches": 2},
    "spo": {"name": "spo", **SPO, "threshold": [0.0, 0.0], "mini_batch_size": 8},
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_stopped_run_of_mini_batches_goes_on_to_the_bit(model: str, tmp_path: Path, name: str) -> None:
    """SPO's 2 prompts x 2 images x 4 random steps fill two mini-batches of 8."""

    def config(folder: str, steps: int) -> Any:
        return online_config(model, tmp_path / folder, ROUNDS[name], steps=steps)

    train(config("whole", 4))
    train(config("halves", 2))
    train(config("halves", 4))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole", "epoch") == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    state = tmp_path / "whole" / "checkpoints" / "step_00000004" / "state.json"
    assert json.loads(state.read_text())["values"]["rounds"] == 2


def test_a_round_cannot_end_in_the_middle(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a multiple"):
        train(online_config(model, tmp_path, ROUNDS["ddpo"], steps=3))


def test_a_run_that_ended_within_a_round_is_not_extended(model: str, tmp_path: Path) -> None:
    """16 pairs in mini-batches of 6 are three steps; after two of them the policy of the round is gone."""
    method = {**ROUNDS["spo"], "mini_batch_size": 6}
    train(online_config(model, tmp_path, method, steps=2))
    with pytest.raises(UserError, match="ended at step 2, in the middle of a round"):
        train(online_config(model, tmp_path, method, steps=4))
    train(online_config(model, tmp_path, method, steps=2))  # the same run again is there already


def test_the_plan_does_not_count_passes_that_the_samples_decide(model: str, tmp_path: Path) -> None:
    fixed, varying = (plan(online_config(model, tmp_path, {**SPO, "name": "spo", **cut}, steps=4)) for cut in CUTS)
    assert fixed.epochs == 1.0 and "1.00 passes over the data" in str(fixed)  # 2 rounds of 2 of 4 prompts
    assert varying.epochs is None and "as many passes as the rounds take over the data" in str(varying)


CUTS: list[dict[str, Any]] = [{"mini_batches": 2}, {"mini_batch_size": 6}]
