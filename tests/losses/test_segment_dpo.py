"""DenseDPO's loss: its limits, and the values of a hand-worked pair."""

from __future__ import annotations

import math

import pytest
import torch

from mmalign.losses import diffusion_dpo, segment_dpo


def errors(pairs: int, segments: int) -> list[torch.Tensor]:
    return list(torch.rand(4, pairs, segments, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_one_segment_is_diffusion_dpo(loss_type: str) -> None:
    given, labels = errors(5, 1), torch.ones(5, 1, dtype=torch.float64)
    whole = diffusion_dpo(*(one[:, 0] for one in given), beta=3.0, loss_type=loss_type)
    torch.testing.assert_close(segment_dpo(*given, labels, beta=3.0, loss_type=loss_type), whole)


def test_the_mean_is_over_labelled_segments_alone() -> None:
    policy, other = torch.zeros(2, 3), torch.zeros(2, 3)
    reference = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    labels = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    # z = beta / 2 * gain of the chosen side = 0.5 * [1, 2] with signs + and -.
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.0))) / 2
    found = segment_dpo(policy, other, reference, other, labels, beta=1.0)
    assert found.tolist() == pytest.approx([expected, 0.0])


def test_turning_all_labels_exchanges_the_sides_and_ties_teach_nothing() -> None:
    given = [one.requires_grad_() for one in errors(4, 3)]
    labels = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).repeat(4, 1)
    turned = segment_dpo(given[1], given[0], given[3], given[2], labels, beta=2.0)
    torch.testing.assert_close(segment_dpo(*given, -labels, beta=2.0), turned)
    loss = segment_dpo(*given, torch.zeros_like(labels), beta=2.0).sum()
    assert loss.item() == 0 and all(one.eq(0).all() for one in torch.autograd.grad(loss, given))
