"""A reference that follows the policy: frozen between refreshes, a part of the way at them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs, exact_run

from mmalign.data.batches import PairBatch
from mmalign.methods.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.methods.run import Run


def pairs() -> PairBatch:
    batch = InMemoryPairs(2).batch(range(2), 1, 0)
    return replace(batch, chosen=batch.chosen.double(), rejected=batch.rejected.double())


def begin(run: Run, **options: Any) -> DiffusionDPO:
    method = DiffusionDPO(DiffusionDPOConfig(beta=50.0, **options))
    method.begin(run)
    return method


def move(run: Run, method: DiffusionDPO, step: int) -> None:
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.add_(0.02)
    run.step = step
    method.after_update(run)


def test_it_moves_a_part_of_the_way_after_every_few_steps(tmp_path: Any) -> None:
    run, batch = exact_run(build_tiny_sd(tmp_path / "sd", "v_prediction", vae="tiny")), pairs()
    method = begin(run, reference_every=2, reference_decay=0.5)
    assert not method.keeps_reference and begin(run).keeps_reference
    start = [one.detach().clone() for one in run.generator.trainable_parameters()]
    assert method.loss(run, batch).loss.item() == pytest.approx(math.log(2), abs=1e-12)
    move(run, method, 0)
    held = method.loss(run, batch)  # still the start
    assert abs(float(held.metrics["logit"])) > 1e-6
    move(run, method, 1)
    # The policy is two steps of 0.02 above the start, the reference half of that.
    for before, now in zip(start, method.tensors().values(), strict=True):
        torch.testing.assert_close(now, before + 0.02)
    again = begin(run, reference_every=2, reference_decay=0.5)
    again.load_tensors(method.tensors())
    assert again.loss(run, batch).loss.item() == method.loss(run, batch).loss.item()
    follows = begin(run, reference_every=1, reference_decay=0.0)
    move(run, follows, 0)
    assert follows.loss(run, batch).loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_a_decay_without_refreshes_is_refused() -> None:
    with pytest.raises(ValidationError, match="reference_decay is for a reference that is refreshed"):
        DiffusionDPOConfig(reference_decay=0.9)
