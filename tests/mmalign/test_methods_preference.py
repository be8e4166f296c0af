"""Methods that learn from stored preferences, on tiny real models: what they compute and that the engine runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs, losses, run_config, write_pairs
from torch import Tensor

from mmalign.batches import PairBatch
from mmalign.engine import train
from mmalign.losses import mapo
from mmalign.methods import methods
from mmalign.methods.base import Method
from mmalign.reference import Reference
from mmalign.run import Run
from pipelines import load_generator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sd", prediction_type="v_prediction", vae="tiny")


class ExactReference(Reference):
    """The reference in the network's own precision."""

    def predict(self, x_t: Any, t: Any, cond: Any) -> Tensor:
        with self.active():
            return self.generator.predict(x_t, t, cond)


class ExactRun(Run):
    """A run in the network's own precision, for finite differences in float64."""

    def predict(self, x_t: Any, t: Any, cond: Any) -> Tensor:
        return self.generator.predict(x_t, t, cond)


def make_run(model: str, scale: float = 0.05) -> Run:
    """A run in float64 whose policy has moved from the reference by `scale`."""
    generator = load_generator(model, device="cpu", dtype=torch.float64)
    generator.add_adapter(4, seed=1)
    generator.network.double()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    generator.network.train()
    return ExactRun(generator, reference=ExactReference(generator, "adapter"))


def make_method(name: str, **options: Any) -> Method[Any]:
    chosen = methods.get(name)
    method: Method[Any] = chosen(chosen.Config(**options))
    return method


def make_pairs(count: int = 3) -> PairBatch:
    batch = InMemoryPairs(count).batch(range(count), 1, 0)
    margins = torch.linspace(-0.1, 0.3, count, dtype=torch.float64)
    return replace(batch, chosen=batch.chosen.double(), rejected=batch.rejected.double(), margins=margins)


def errors_by_hand(run: Run, batch: PairBatch, predict: Any, low: int = 0, high: int = 1000) -> list[Tensor]:
    """Errors of the chosen and of the rejected side, each in a forward pass of its own."""
    noise, t = run.noise_like(batch.chosen, batch.ids, batch.epoch), run.timesteps(batch, low, high)
    found = []
    for x in (batch.chosen, batch.rejected):
        predicted = predict(run.process.add_noise(x, noise, t), t, batch.cond)
        found.append((predicted - run.process.target(x, noise, t)).square().mean(dim=(1, 2, 3)))
    return found


OPTIONS: dict[str, dict[str, Any]] = {"diffusion_dpo": {"beta": 5.0}, "mapo": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_equals_finite_differences(model: str, name: str) -> None:
    run, method, batch = make_run(model), make_method(name, **OPTIONS[name]), make_pairs()
    parameters = list(run.generator.trainable_parameters())
    source = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in parameters]

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along, alpha=step)
        value = method.loss(run, batch).loss.item()
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.sub_(along, alpha=step)
        return value

    gradients = torch.autograd.grad(method.loss(run, batch).loss, parameters)
    analytic = sum((g * along).sum() for g, along in zip(gradients, direction, strict=True))
    assert float(analytic) == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-6)


def test_mapo_is_its_formula_on_separate_forward_passes_and_keeps_no_reference(model: str) -> None:
    run, batch = make_run(model), make_pairs()
    method = make_method("mapo", beta=0.3, snr=0.7, timesteps=(0.2, 0.9))
    output = method.loss(run, batch)
    chosen, rejected = errors_by_hand(run, batch, run.predict, 200, 900)
    expected = mapo(chosen, rejected, beta=0.3, snr=0.7, scale=1000.0).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert float(output.metrics["accuracy"]) == pytest.approx((chosen < rejected).double().mean().item())
    assert not method.needs.reference and "no reference" in method.describe()


RUNS: dict[str, dict[str, Any]] = {
    "robust": {"name": "diffusion_dpo", "loss_type": "robust", "label_smoothing": 0.1},
    "mapo": {"name": "mapo"},
}


@pytest.mark.parametrize("method", RUNS.values(), ids=RUNS)
def test_the_engine_runs_it(model: str, method: dict[str, Any], tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    output = train(run_config(model, pairs, tmp_path / "out", method, steps=2))
    assert set(losses(output)) == {1, 2}
