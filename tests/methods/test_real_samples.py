"""Likelihood terms beside a preference: of winners, of good images, and of real ones as pairs with themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs, exact_run
from torch import Tensor

from mmalign.data.batches import LabelBatch, PairBatch
from mmalign.methods.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.methods.diffusion_kto import DiffusionKTO, DiffusionKTOConfig
from mmalign.methods.noising import noise_images, noise_pairs
from mmalign.methods.run import Run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sd", vae="tiny")


def gradient(run: Run, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(run.generator.trainable_parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def some(rows: range, *, real: bool = False) -> PairBatch:
    batch = InMemoryPairs(5).batch(rows, 1, 0)
    chosen = batch.chosen.double()
    return replace(batch, chosen=chosen, rejected=chosen if real else batch.rejected.double())


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_a_real_image_beside_itself_teaches_its_likelihood_alone(model: str, loss_type: str) -> None:
    """Of 2 pairs and 3 real images the gradient is 2/5 (pairs + w winners) + 3/5 w real."""
    run, weight = exact_run(model), 0.7
    method = DiffusionDPO(DiffusionDPOConfig(beta=5.0, sft_weight=weight, loss_type=loss_type))
    plain = DiffusionDPO(DiffusionDPOConfig(beta=5.0, loss_type=loss_type))
    own, real, both = some(range(2)), some(range(2, 5), real=True), some(range(5))
    both.rejected[2:] = both.chosen[2:]
    found = gradient(run, method.loss(run, both).loss)
    winners = gradient(run, noise_pairs(run, own, method.config).pair_errors(run.predict)[0].mean())
    likelihood = gradient(run, noise_pairs(run, real, method.config).pair_errors(run.predict)[0].mean())
    expected = 2 / 5 * (gradient(run, plain.loss(run, own).loss) + weight * winners) + 3 / 5 * weight * likelihood
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert gradient(run, plain.loss(run, real).loss).abs().max() < 1e-12 < likelihood.abs().max()


def test_kto_learns_the_likelihood_of_good_images(model: str) -> None:
    run, batch = exact_run(model), some(range(4))
    good = torch.tensor([True, False, False, True])
    labels = LabelBatch(batch.chosen, good, batch.cond, batch.ids, 1)
    plain, method = (DiffusionKTO(DiffusionKTOConfig(beta=5.0, sft_weight=weight)) for weight in (0.0, 0.3))
    errors = noise_images(run, labels, method.config).errors(run.predict)
    expected = plain.loss(run, labels).loss + 0.3 * errors[[0, 3]].sum() / 4
    assert float(method.loss(run, labels).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert "sft_weight=0.3" in method.describe()
