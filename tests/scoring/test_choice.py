"""The signed weighted sum of rewards, of numbers in bulk and of tensors in training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmalign.scoring.choice import WeightedReward, weighted_total


def test_the_weighted_sum_is_the_same_of_numbers_and_of_tensors() -> None:
    up, down = SimpleNamespace(higher_is_better=True), SimpleNamespace(higher_is_better=False)
    rewards = [WeightedReward("a", 0.5, up), WeightedReward("b", 2.0, down)]
    assert weighted_total({"a": 3.0, "b": 0.25, "unused": 9.0}, rewards) == 1.0  # 0.5 * 3 - 2 * 0.25
    parts = {"a": torch.tensor([3.0, -1.0], requires_grad=True), "b": torch.tensor([0.25, 1.0])}
    total = weighted_total(parts, rewards)
    assert total.tolist() == [1.0, -2.5]
    assert torch.autograd.grad(total.sum(), parts["a"])[0].tolist() == [0.5, 0.5]
    with pytest.raises(TypeError):
        weighted_total({}, [])
