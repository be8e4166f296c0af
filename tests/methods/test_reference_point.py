"""KTO's reference point: one mean over the step, whatever its micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmalign.methods.reference_point import Centred, centred

GAINS = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([-2.0, 6.0])}


def batch(name: str) -> Any:
    return SimpleNamespace(name=name)


def test_micro_batches_share_the_mean_of_the_step() -> None:
    asked: list[str] = []

    def gain(one: Any) -> torch.Tensor:
        asked.append(one.name)
        assert not torch.is_grad_enabled()
        return GAINS[one.name]

    first, second = centred(map(batch, "ab"), gain)
    assert asked == ["a", "b"]
    for one, name in ((first, "a"), (second, "b")):
        assert one.reference_point(GAINS[name]).item() == pytest.approx((1 + 3 - 2 + 6) / 4)


def test_one_micro_batch_costs_no_pass_of_its_own() -> None:
    (alone,) = centred([batch("a")], lambda one: pytest.fail("no second pass is needed"))
    assert alone.reference_point(GAINS["a"]).item() == 2.0
    assert Centred.of(alone) is alone and Centred.of(batch("b")).point is None
