"""Methods of images train video generators unchanged: one step of each on tiny AnimateDiff and CogVideoX."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_motion import build_tiny_animatediff, build_tiny_cogvideox
from tiny_runs import InMemoryPairs
from torch import Tensor

from mmalign.data.batches import LabelBatch, PromptBatch
from mmalign.methods import methods
from mmalign.methods.base import Method
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.scoring.choice import WeightedReward
from pipelines import VideoOptions, load_generator
from rewards import Reward

BUILDERS: dict[str, tuple[Callable[[Path], str], int, int]] = {
    "animatediff": (build_tiny_animatediff, 3, 16),
    "animatediff flow": (lambda path: build_tiny_animatediff(path, "flow_prediction"), 3, 16),
    "cogvideox 2b": (lambda path: build_tiny_cogvideox(path, "2b"), 9, 24),
    "cogvideox 5b": (build_tiny_cogvideox, 9, 24),
    "cogvideox 1.5": (lambda path: build_tiny_cogvideox(path, "1.5"), 9, 24),
}
"""Builder, frames and width of the text embeddings."""
DRAWN = {"sampling_steps": 2, "guidance": 1.0, "images_per_prompt": 2}
FORWARD = {"sampling_steps": 2, "images_per_prompt": 2, "levels": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {},
    "diffusion_dpo": {},
    "diffusion_kto": {},
    "mapo": {},
    "capo": {},
    "smpo": {"inversion_steps": 2, "scale": 0.2},
    "inpo": {"inversion_steps": 2},
    "diffusion_dro": {"sampling_steps": 2},
    "align_prop": {"sampling_steps": 2, "guidance": 3.0},
    "align_prop refl": {"sampling_steps": 2, "guidance": 1.0, "truncation": "refl"},
    "prdp": {**DRAWN, "updates_per_round": 2},
    "ddpo": DRAWN,
    "flow_grpo": {**DRAWN, "sampling_steps": 4, "kl": {"weight": 0.1}},
    "spo": {"sampling_steps": 2, "guidance": 1.0, "candidates": 2, "threshold": [0.0, 0.0]},
    "dense_dpo": {**DRAWN, "clip": 1.0, "updates_per_round": 2},
    "nft": FORWARD,
    "awm": {**FORWARD, "sampler_steps": [0, 2]},
    "dgpo": {**FORWARD, "sampler_steps": [0, 2]},
}
VELOCITY = ("nft", "awm", "dgpo")
QUICK = {
    *(("animatediff", name) for name in ("diffusion_dpo", "align_prop", "ddpo")),
    *(("animatediff flow", name) for name in ("nft", "flow_grpo")),
    *(("cogvideox 5b", name) for name in ("diffusion_dpo", "nft", "align_prop")),
    *(("cogvideox 1.5", name) for name in ("sft",)),
}
GRID = [
    pytest.param(family, name, marks=[] if (family, name) in QUICK else pytest.mark.slow)
    for family in BUILDERS
    for name in OPTIONS
    if not (family == "animatediff" and name in VELOCITY) and not (name == "flow_grpo" and "flow" not in family)
]


class Motion(Reward):
    """How much neighbouring frames differ."""

    name = "motion"
    modality = "video"
    differentiable = True
    range = (0.0, 1.0)

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.diff(dim=1).square().mean((1, 2, 3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


def make_run(folder: Path, family: str) -> Run:
    """A run with a LoRA on a model of `BUILDERS`, built when it is first asked for."""
    build, frames, _ = BUILDERS[family]
    path = folder / family.replace(" ", "-")
    model = str(path) if path.exists() else build(path)
    generator = load_generator(model, device="cpu", video=VideoOptions(frames=frames))
    generator.add_adapter(2)
    generator.network.train()
    generator.enable_gradient_checkpointing()
    rewards = [WeightedReward("motion", 1.0, Motion())]
    return Run(generator, reference=Reference(generator, "adapter"), rewards=rewards)


def make_method(name: str) -> Method[Any]:
    chosen = methods.get(name.split()[0])
    method: Method[Any] = chosen(chosen.Config(**OPTIONS[name]))
    return method


def batch_for(run: Run, family: str, method: Method[Any]) -> Any:
    """Two samples of what the method learns from, in memory."""
    if method.needs.source == "prompts":
        texts = ["a red circle", "two blue stars"]
        return PromptBatch(texts, run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])
    length = 16
    pairs = InMemoryPairs(2, run.generator.latent_shape, length, BUILDERS[family][2]).batch(range(2), 0, 0)
    if method.needs.source == "pairs":
        pairs.margins = torch.tensor([0.2, 0.4])
        return pairs
    return LabelBatch(pairs.chosen, torch.tensor([True, False]), pairs.cond, pairs.ids)


@pytest.mark.parametrize(("family", "name"), GRID)
def test_one_step_trains_the_policy_and_not_the_reference(folder: Path, family: str, name: str) -> None:
    run, method = make_run(folder, family), make_method(name)
    method.check(run.process)
    method.begin(run)
    with torch.no_grad():  # a first step leaves A of a LoRA alone: start from a later one
        for parameter in run.generator.trainable_parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x, t = torch.ones(1, *run.generator.latent_shape), torch.tensor([500])
    cond = run.generator.encode_prompts(["a star"])
    before = run.reference.predict(x, t, cond), run.predict(x, t, cond).detach()
    optimizer = torch.optim.SGD(run.generator.trainable_parameters(), lr=1e-2)
    collected = list(method.collect(run, [batch_for(run, family, method)]))
    for part in method.split(run, collected):
        for batch in part:
            metrics = method.learn(run, batch, lambda loss: loss.backward())
            assert all(torch.as_tensor(value).detach().isfinite() for value in metrics.values())
        gradients = [parameter.grad for parameter in run.generator.trainable_parameters()]
        assert all(one is not None and bool(one.isfinite().all()) for one in gradients)
        assert any(bool(one.any()) for one in gradients if one is not None)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(run)
        run.step += 1
    assert torch.equal(run.reference.predict(x, t, cond), before[0])
    assert not torch.equal(run.predict(x, t, cond), before[1])


@pytest.mark.parametrize("family", ["animatediff", "cogvideox 5b", "cogvideox 1.5"])
def test_dpo_starts_at_log_two(folder: Path, family: str) -> None:
    run, method = make_run(folder, family), make_method("diffusion_dpo")
    output = method.loss(run, batch_for(run, family, method))
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6) and output.metrics["logit"] == 0


@pytest.mark.parametrize("family", ["animatediff", "cogvideox 5b"])
def test_the_gradient_of_a_reward_is_the_same_with_checkpointing(folder: Path, family: str) -> None:
    """Recomputed network calls and frames decoded one by one, against everything kept."""
    found: list[list[Tensor]] = []
    for checkpoint in (True, False):
        run = make_run(folder, family)
        chosen = methods.get("align_prop")
        options = {**OPTIONS["align_prop"], "truncation": "full", "checkpoint": checkpoint}
        method = chosen(chosen.Config(**options))
        loss = method.loss(run, batch_for(run, family, method)).loss
        found.append(list(torch.autograd.grad(loss, run.generator.trainable_parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    assert any(bool(one.any()) for one in found[0])
