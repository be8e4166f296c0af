"""The objective of a latent reward, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmalign.losses import latent_reward, pair_weights


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_loss_is_softmax_cross_entropy_less_the_entropy_of_the_label() -> None:
    first, second = double(1.3, -0.4, 2.0, 0.0), double(0.2, 0.9, 2.0, 5.0)
    preference = double(1.0, 1.0, 0.5, 0.25)
    logits, target = torch.stack([first, second], 1), torch.stack([preference, 1 - preference], 1)
    cross = F.cross_entropy(logits, target, reduction="none")
    entropy = double(0.0, 0.0, math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    torch.testing.assert_close(latent_reward(first, second, preference), cross - entropy, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(latent_reward(second, first, 1 - preference), cross - entropy, rtol=1e-12, atol=1e-14)


def test_equal_scores_cost_log_two_for_a_winner_and_nothing_for_a_tie() -> None:
    equal = double(3.0, 3.0)
    assert latent_reward(equal, equal, double(1.0, 0.5)).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-15)
    apart = latent_reward(double(3.1, 2.9), double(3.0, 3.0), double(0.5, 0.5))
    # KL of fair coin and sigmoid(0.1): log cosh(0.05)
    assert apart.tolist() == pytest.approx([math.log(math.cosh(0.05))] * 2, rel=1e-9)


def test_gradient_is_probability_less_label_and_equals_finite_differences() -> None:
    first, second = double(0.4, -1.0, 0.3).requires_grad_(), double(0.1, 0.5, 0.3).requires_grad_()
    preference = double(1.0, 0.5, 0.0)
    (gradient,) = torch.autograd.grad(latent_reward(first, second, preference).sum(), first)
    expected = (first - second).sigmoid() - preference
    torch.testing.assert_close(gradient, expected.detach())
    assert torch.autograd.gradcheck(lambda a, b: latent_reward(a, b, preference), (first, second))


def test_scores_far_apart_stay_finite() -> None:
    far = double(200.0, -200.0)
    assert latent_reward(far, -far, double(1.0, 1.0)).tolist() == pytest.approx([0.0, 400.0])


def test_every_prompt_weighs_the_same() -> None:
    weights = pair_weights(["a", "b", "a", "a", "c"])
    # 1/3, 1, 1/3, 1/3, 1 add up to 3; times 5/3
    assert weights.tolist() == pytest.approx([5 / 9, 5 / 3, 5 / 9, 5 / 9, 5 / 3], rel=1e-12)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-15)


def test_a_preference_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        latent_reward(double(0.0), double(0.0), double(1.5))
