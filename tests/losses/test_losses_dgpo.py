"""Direct group preference optimisation in float64: by loops, as DPO for two images, and what changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.losses import dgpo, diffusion_dpo, moved_enough


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def advantages_of(groups: int, size: int, seed: int = 3) -> Tensor:
    values = rand(groups, size, seed=seed)
    return ((values - values.mean(1, keepdim=True)) / values.std(correction=0)).flatten()


def gradient(losses: Tensor, errors: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(losses.sum(), errors)
    return found


def test_against_loops_in_plain_python() -> None:
    errors, reference, a = rand(8, seed=1).requires_grad_(), rand(8, seed=2), advantages_of(2, 4)
    found, beta = dgpo(errors, reference, a, group=4, beta=3.0), 3.0
    for row in range(8):
        members = range(row // 4 * 4, row // 4 * 4 + 4)
        total = sum(float(a[i]) * beta * float(errors[i].detach() - reference[i]) for i in members) / 4
        weight = 1 / (1 + math.exp(-total))
        assert found[row].item() == pytest.approx(weight * float(a[row] * errors[row].detach()), rel=1e-12)
        assert gradient(dgpo(errors, reference, a, group=4, beta=beta), errors)[row].item() == pytest.approx(
            weight * float(a[row]), rel=1e-12
        )


def test_two_images_are_diffusion_dpo_s_gradient_over_beta() -> None:
    errors, reference = rand(6, seed=1).requires_grad_(), rand(6, seed=2)
    a = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    ours = gradient(dgpo(errors, reference, a, group=2, beta=7.0) / 2, errors)
    pairs = diffusion_dpo(errors[::2], errors[1::2], reference[::2], reference[1::2], beta=7.0)
    torch.testing.assert_close(ours, gradient(pairs, errors) / 7.0, rtol=1e-12, atol=0)


def test_it_is_the_gradient_of_the_group_s_preference_loss() -> None:
    errors, reference, a = rand(10, seed=1).requires_grad_(), rand(10, seed=2), advantages_of(2, 5)
    gain = (a * (errors - reference)).reshape(2, 5).sum(1) / 5
    preference = -torch.nn.functional.logsigmoid(-4.0 * gain)
    ours = gradient(dgpo(errors, reference, a, group=5, beta=4.0) / 5, errors)
    torch.testing.assert_close(ours, gradient(preference, errors) / 4.0, rtol=1e-12, atol=1e-15)


def test_a_constant_added_to_the_references_errors_changes_nothing() -> None:
    errors, reference, a = rand(8, seed=1), rand(8, seed=2), advantages_of(2, 4)
    shift = torch.tensor([0.7, -3.0], dtype=torch.float64).repeat_interleave(4)
    before = dgpo(errors, reference, a, group=4, beta=50.0)
    torch.testing.assert_close(dgpo(errors, reference + shift, a, group=4, beta=50.0), before, rtol=1e-10, atol=1e-12)
    biased = a + 0.1  # where advantages do not add up to 0, it does
    assert (dgpo(errors, reference + shift, biased, group=4, beta=50.0) / biased - before / a).abs().max() > 1e-3


def test_a_group_in_better_order_than_the_references_counts_less() -> None:
    a, reference = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weights = [
        dgpo(reference + torch.tensor([-gap, gap]), reference, a, group=2, beta=10.0)[0].item() / (1 - gap)
        for gap in (-0.3, 0.0, 0.3)
    ]
    assert weights == pytest.approx([1 / (1 + math.exp(-3)), 0.5, 1 / (1 + math.exp(3))])


def test_who_has_moved_enough() -> None:
    old = torch.full((6,), 0.5, dtype=torch.float64)
    # ratio exp(old - error): 1 + 0.01 is passed at 0.5 - log 1.01 = 0.49005, 1 - 0.01 at 0.51005
    errors = torch.tensor([0.489, 0.491, 0.52, 0.511, 0.5095, 0.48], dtype=torch.float64)
    a = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    assert moved_enough(errors, old, a, clip=0.01).tolist() == [True, False, False, True, False, False]
    assert not moved_enough(old, old, a, clip=1e-9).any()


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_named() -> None:
    e = torch.zeros(4)
    with pytest.raises(ValueError, match="beta=0"):
        dgpo(e, e, e, group=2, beta=0.0)
    with pytest.raises(ValueError, match="4 images are not whole groups of 3"):
        dgpo(e, e, e, group=3, beta=1.0)
    with pytest.raises(ValueError, match=r"\(4,\), \(3,\), \(4,\)"):
        dgpo(e, e[:3], e, group=2, beta=1.0)
    with pytest.raises(ValueError, match="clip=0"):
        moved_enough(e, e, e, clip=0.0)
