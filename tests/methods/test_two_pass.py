"""The gradient in two passes equals that of one graph for every method, and holds one sample's activations."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs, exact_run, losses, run_config, write_pairs
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mmalign.config.run import load_config
from mmalign.core.errors import UserError
from mmalign.data.batches import LabelBatch, PairBatch
from mmalign.methods import methods
from mmalign.methods.base import Method
from mmalign.methods.run import Run
from mmalign.training.prepare import in_two_passes
from mmalign.training.train import train

PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("diffusion_dpo", {"beta": 5.0}),
    ("diffusion_dpo", {"beta": 5.0, "loss_type": "ipo"}),
    ("diffusion_dpo", {"beta": 5.0, "loss_type": "hinge"}),
    ("diffusion_dpo", {"beta": 5.0, "loss_type": "robust", "label_smoothing": 0.2}),
    ("diffusion_dpo", {"beta": 5.0, "sft_weight": 0.3, "anchor_weight": 2.0, "discount": 0.9}),
    ("diffusion_dpo", {"auto_beta": 0.2}),
    ("capo", {"beta": 5.0, "level_bias": 0.5}),
    ("smpo", {"beta": 5.0, "scale": 0.2}),
    ("smpo", {"beta": 5.0, "scale": 0.2, "noising": "gaussian"}),
    ("inpo", {"beta": 5.0, "inversion_steps": 2}),
    ("mapo", {}),
]
LABELS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("diffusion_kto", {"beta": 5.0}),
    ("tpo", {"beta": 5.0}),
    ("tpo", {"beta": 5.0, "objective": "tkto"}),
    ("diffusion_dro", {"sampling_steps": 2}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sd", prediction_type="v_prediction", vae="tiny")


def make_method(name: str, options: dict[str, Any]) -> Method[Any]:
    chosen = methods.get(name)
    made: Method[Any] = chosen(chosen.Config(**options))
    return made


def pairs(count: int = 3) -> PairBatch:
    batch = InMemoryPairs(count).batch(range(count), 1, 0)
    margins = torch.linspace(-0.1, 0.3, count, dtype=torch.float64)
    return replace(batch, chosen=batch.chosen.double(), rejected=batch.rejected.double(), margins=margins)


def labels(count: int = 3) -> LabelBatch:
    batch = pairs(count)
    other = InMemoryPairs(2 * count).batch(range(count, 2 * count), 1, 0).cond
    return LabelBatch(batch.chosen, torch.arange(count) % 2 == 0, batch.cond, batch.ids, 1, other)


def gradients(model: str, method: Method[Any], batch: Any, **options: Any) -> tuple[dict[str, Tensor], Run, Any]:
    """Return the gradient of one round of a micro-batch, the run, and the metrics."""
    run = exact_run(model, **options)
    [collected] = method.collect(run, [batch])
    metrics = method.learn(run, collected, lambda loss: loss.backward())
    named = run.generator.network.named_parameters()
    return {name: one.grad for name, one in named if one.grad is not None}, run, metrics


@pytest.mark.parametrize(("name", "options"), [*PAIRS, *LABELS], ids=lambda one: one if isinstance(one, str) else "")
def test_the_gradient_is_that_of_one_graph(model: str, name: str, options: dict[str, Any]) -> None:
    batch = pairs() if (name, options) in PAIRS else labels()
    whole, _, before = gradients(model, make_method(name, options), batch)
    parts, _, after = gradients(model, make_method(name, options), batch, two_pass=True)
    assert whole.keys() == parts.keys() and max(one.abs().max() for one in whole.values()) > 1e-6
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-10, atol=1e-10)
    assert after["loss"].item() == pytest.approx(before["loss"].item(), rel=1e-12)


def test_one_sample_at_a_time_and_the_last_is_not_computed_twice(model: str) -> None:
    run, calls = exact_run(model, two_pass=True), list[tuple[int, bool]]()

    def record(network: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((len(args[0] if args else kwargs["sample"]), torch.is_grad_enabled()))

    run.generator.network.register_forward_pre_hook(record, with_kwargs=True)
    run.cost.watch(run.generator.network)
    run.cost.start()
    make_method("diffusion_dpo", {"beta": 5.0}).learn(run, pairs(2), lambda loss: loss.backward())
    # Four sides: the policy's first pass, the reference, and the second pass of all sides but the last.
    assert calls == [(1, True)] * 4 + [(1, False)] * 4 + [(1, True)] * 3
    assert run.cost.images_seen == 4 + 4 + 4  # forward, reference, backward; nothing that is computed again


def test_the_activations_of_one_sample_are_held_whatever_the_batch(model: str) -> None:
    def most_held(count: int, **options: Any) -> int:
        """Return the most bytes that a step holds at once."""
        run, batch = exact_run(model, **options), pairs(count)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            make_method("diffusion_dpo", {"beta": 5.0}).learn(run, batch, lambda loss: loss.backward())
        events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
        return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))

    single, four = most_held(1, two_pass=True), most_held(4, two_pass=True)
    assert four < 1.25 * single  # further outputs and latents, no further activations
    assert most_held(4) > 6 * single


def test_dropout_is_the_same_in_both_passes(model: str) -> None:
    from mmalign.methods.two_pass import predict_by_sample
    from pipelines.conditioning import Conditioning

    layer, drop = nn.Linear(8, 8).double(), nn.Dropout(0.5)
    x, t, cond = torch.randn(3, 8).double(), torch.zeros(3), Conditioning(torch.zeros(3, 1, 1))
    seen: list[Tensor] = []

    def predict(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(drop(torch.ones(8)))
        return layer(x_t) * seen[-1]

    predict_by_sample(predict, x, t, cond).square().sum().backward()
    assert len(seen) == 5 and torch.equal(seen[1], seen[3]) and torch.equal(seen[0], seen[4])


@pytest.mark.slow
def test_training_gives_the_same_model_and_it_can_be_switched_on_a_resume(model: str, tmp_path: Path) -> None:
    data, found = write_pairs(tmp_path / "data"), []
    for two_pass in (False, True):
        out = tmp_path / str(two_pass)
        train(run_config(model, data, out, {"name": "diffusion_dpo", "beta": 50.0, "two_pass": two_pass}))
        found.append(losses(out))
    assert found[0].keys() == found[1].keys() and found[0] == pytest.approx(found[1], rel=1e-4)
    train(run_config(model, data, tmp_path / "True", {"name": "diffusion_dpo", "beta": 50.0}, steps=6))


def test_the_default_is_on_for_videos_alone() -> None:
    class Video:
        modality = "video"

    for given, image, video in ((None, False, True), (True, True, True), (False, False, False)):
        method = make_method("diffusion_dpo", {"two_pass": given})
        assert in_two_passes(method, object()) is image and in_two_passes(method, Video()) is video
    assert in_two_passes(make_method("vlm_dpo", {}), Video()) is False


@pytest.mark.parametrize("config", ["shapes/spo", "shapes_vlm/vlm_dpo"])
def test_a_method_that_cannot_says_so(config: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(config, ["method.two_pass=true"])
    assert "method.two_pass: not supported: the loss of this method" in str(error.value)
    assert "unknown" not in str(error.value)
