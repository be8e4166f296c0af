"""The objectives on a policy's own steps and images, in float64: dense-reward DPO, SPO, Diffusion-DRO."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mmalign.losses import (
    dense_logit,
    diffusion_dro,
    discounted_probabilities,
    dynamic_threshold,
    list_mle,
    spo,
    spo_logit,
    step_preference,
)


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Dense-reward DPO


def test_discounted_law_is_the_geometric_one() -> None:
    assert discounted_probabilities(4, 0.5).tolist() == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15], rel=1e-15)
    assert discounted_probabilities(7, 1.0).tolist() == pytest.approx([1 / 7] * 7, rel=1e-15)
    assert discounted_probabilities(5, 1e-12)[0] == pytest.approx(1.0, abs=1e-11)
    # A geometric series: two thirds of the mass on the first ten steps of fifty.
    law = discounted_probabilities(50, 0.9).cumsum(0)
    assert law[9].item() == pytest.approx((1 - 0.9**10) / (1 - 0.9**50), rel=1e-13) == pytest.approx(0.655, abs=5e-4)


def test_mean_over_drawn_steps_expects_the_discounted_sum() -> None:
    """All 4^2 draws of two steps, each with its probability, give C sum gamma^k rho_k / sum gamma^k."""
    gamma, rho = 0.7, randn(4, 1, seed=0)
    weights = [gamma**k for k in range(4)]
    expected = 3.0 * sum(w * float(r) for w, r in zip(weights, rho, strict=True)) / sum(weights)
    law, total = discounted_probabilities(4, gamma), 0.0
    for draw in itertools.product(range(4), repeat=2):
        counts = torch.tensor(draw).bincount(minlength=4).unsqueeze(1)
        total += float(law[list(draw)].prod() * dense_logit(rho, counts, scale=3.0, clip=math.inf))
    assert total == pytest.approx(expected, rel=1e-12)


def test_clamp_bounds_the_logits_and_stops_the_gradient_on_both_sides() -> None:
    scale, clip = 10.0, 1e-4
    rho = double([5e-5, 2e-4], [-3e-4, -2e-5], [9e-5, 0.0]).requires_grad_()
    counts = torch.tensor([[1, 2], [1, 0], [0, 1]])
    logit = dense_logit(rho, counts, scale=scale, clip=clip)
    # (5e-5 - 1e-4) / 2 and (1e-4 + 1e-4 + 0) / 3, times 10
    assert logit.tolist() == pytest.approx([-2.5e-4, 2e-3 / 3], rel=1e-12)
    (gradient,) = torch.autograd.grad(logit.sum(), rho)
    torch.testing.assert_close(gradient, double([5.0, 0.0], [0.0, 0.0], [0.0, 10 / 3]))
    # Two images: |difference| <= 2 C clip, so the loss lies in [0.6921, 0.6942]
    losses = [list_mle(double([s * scale * clip, -s * scale * clip]), double([1.0, 0.0])).item() for s in (1, -1)]
    assert losses == pytest.approx([0.692148, 0.694148], abs=1e-6)


def test_ranking_two_images_is_bradley_terry() -> None:
    logit, reward = randn(50, 2, seed=1), randn(50, 2, seed=2)
    for z, r, loss in zip(logit.tolist(), reward.tolist(), list_mle(logit, reward).tolist(), strict=True):
        gap = z[0] - z[1] if r[0] > r[1] else z[1] - z[0]
        assert loss == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-12)


def test_ranking_is_plackett_luce_over_all_orders() -> None:
    """The probabilities of all 4! orders add up to 1, and that of one is the product of its softmaxes."""
    logit = randn(4, seed=3)
    orders = list(itertools.permutations(range(4)))
    rewards = torch.stack([double(*(4.0 - order.index(i) for i in range(4))) for order in orders])
    loss = list_mle(logit.expand(24, 4), rewards)
    assert (-loss).exp().sum().item() == pytest.approx(1.0, rel=1e-12)
    e = logit.exp().tolist()
    a, b, c, d = orders[9]
    by_hand = e[a] / sum(e) * e[b] / (e[b] + e[c] + e[d]) * e[c] / (e[c] + e[d])
    assert loss[9].item() == pytest.approx(-math.log(by_hand), rel=1e-12)


def test_ranking_of_equal_rewards_keeps_the_order_given_and_starts_at_log_factorial() -> None:
    logit = double([0.3, -0.1, 0.8])
    tied = list_mle(logit, torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(tied, list_mle(logit, double([3.0, 2.0, 1.0])))
    assert list_mle(torch.zeros(1, 3, dtype=torch.float64), double([1.0, 5.0, 2.0])).item() == pytest.approx(
        math.log(6), rel=1e-14
    )


def test_dense_gradient_equals_finite_differences() -> None:
    counts = torch.tensor([[1, 1, 0], [0, 2, 3], [2, 0, 1]])
    reward = double([0.2, 1.0, -0.4])

    def objective(rho: Tensor) -> Tensor:
        return list_mle(dense_logit(rho, counts, scale=2.0, clip=0.9).unsqueeze(0), reward)

    assert torch.autograd.gradcheck(objective, (0.4 * randn(3, 3, seed=4)).requires_grad_())


# SPO


def test_best_and_worst_by_hand_whatever_the_order_of_the_candidates() -> None:
    score = double([0.1, 2.0, -1.0], [0.7, 0.5, -1.2], [0.2, 1.0, -1.1])
    best, worst, valid = step_preference(score, 0.3)
    assert (best.tolist(), worst.tolist()) == ([1, 0, 0], [0, 1, 1])
    # softmax gaps tanh(gap / 2) of 0.6, 1.5, 0.2: 0.291, 0.635, 0.0997
    assert valid.tolist() == [False, True, False]
    order = torch.tensor([2, 0, 1])
    best_again, worst_again, valid_again = step_preference(score[order], 0.3)
    assert torch.equal(order[best_again], best) and torch.equal(order[worst_again], worst)
    assert torch.equal(valid_again, valid)


@pytest.mark.parametrize(("threshold", "gap"), [(0.35, 0.7309), (0.5, 1.0986), (0.3, 0.6190)])
def test_threshold_on_probabilities_is_a_gap_of_scores(threshold: float, gap: float) -> None:
    """p - q of a softmax exceeds th where the scores differ by more than log((1 + th) / (1 - th))."""
    assert gap == pytest.approx(math.log((1 + threshold) / (1 - threshold)), abs=5e-5)
    score = double([gap - 1e-3, gap + 1e-3, 0.0], [0.0, 0.0, 0.0])
    p = score.softmax(0)
    assert (
        step_preference(score, threshold)[2].tolist() == ((p[0] - p[1]) > threshold).tolist() == [False, True, False]
    )
    masks = [int(step_preference(randn(4, 200, seed=1), th)[2].sum()) for th in (0.0, threshold, 0.9)]
    assert masks == sorted(masks, reverse=True) and masks[0] == 200 > masks[1] > masks[2]


def test_threshold_is_linear_in_the_noise_of_the_step() -> None:
    at = [dynamic_threshold(std, (0.1, 0.6), (0.35, 0.5)) for std in (0.1, 0.35, 0.6)]
    assert at == pytest.approx([0.35, 0.425, 0.5])
    assert dynamic_threshold(0.2, (0.2, 0.2), (0.3, 0.4)) == 0.3


def test_spo_starts_at_log_two_and_its_logit_is_bounded() -> None:
    zeros, valid = torch.zeros(3, dtype=torch.float64), torch.tensor([True, True, False])
    assert spo(zeros, zeros, valid, beta=10.0, clip=0.1).tolist() == pytest.approx([math.log(2), math.log(2), 0.0])
    far = double(50.0, -50.0, 0.05)
    logit = spo_logit(far, -far, beta=10.0, clip=0.1)
    bound = 10 * math.log(1.1 / 0.9)  # 2.00671
    # Inside the clamp the ratios are not changed: 10 * (0.05 + 0.05)
    assert logit.tolist() == pytest.approx([bound, -bound, 1.0], rel=1e-12)
    assert bound == pytest.approx(2.00671, abs=1e-5)


def test_spo_gradient_ends_at_the_clamp_on_both_sides_and_where_a_pair_does_not_count() -> None:
    best, worst = double(0.02, 0.2, -0.2, 0.02).requires_grad_(), double(-0.03, 0.0, 0.0, -0.03).requires_grad_()
    valid = torch.tensor([True, True, True, False])
    grads = torch.autograd.grad(spo(best, worst, valid, beta=2.0, clip=0.1).sum(), (best, worst))
    slope = -2 / (1 + math.exp(2 * 0.05))  # -beta sigmoid(-z), z = 2 (0.02 + 0.03)
    low, high = (-2 / (1 + math.exp(2 * math.log(edge))) for edge in (1.1, 0.9))
    assert grads[0].tolist() == pytest.approx([slope, 0.0, 0.0, 0.0], rel=1e-12)
    assert grads[1].tolist() == pytest.approx([-slope, -low, -high, 0.0], rel=1e-12)
    swapped = spo(worst, best, valid, beta=2.0, clip=0.1) - spo(best, worst, valid, beta=2.0, clip=0.1)
    logit = spo_logit(best, worst, beta=2.0, clip=0.1)
    torch.testing.assert_close(swapped[:3], logit[:3])  # L(-z) - L(z) = z


def test_spo_gradient_equals_finite_differences() -> None:
    valid = torch.tensor([True, False, True, True])

    def objective(best: Tensor, worst: Tensor) -> Tensor:
        return spo(best, worst, valid, beta=3.0, clip=0.4)

    inputs = [(0.1 * randn(4, seed=seed)).requires_grad_() for seed in (5, 6)]
    assert torch.autograd.gradcheck(objective, inputs)


# Diffusion-DRO


def test_dro_is_the_margin_where_all_networks_are_equal() -> None:
    expert, own = double(0.3, 0.01), torch.zeros(2, dtype=torch.float64)
    assert diffusion_dro(expert, expert, own, own).tolist() == [1e-3, 1e-3]


def test_dro_by_hand_and_flat_where_the_ranking_holds() -> None:
    errors = [double(0.50, 0.20), double(0.40, 0.30), double(0.00, 0.02), double(0.05, 0.01)]
    policy_expert, _, policy_own, _ = (error.requires_grad_() for error in errors)
    loss = diffusion_dro(*errors, margin=0.01)
    # 0.10 - (-0.05) + 0.01 and -0.10 - 0.01 + 0.01 < 0
    assert loss.tolist() == pytest.approx([0.16, 0.0])
    grads = torch.autograd.grad(loss.sum(), (policy_expert, policy_own))
    assert [grad.tolist() for grad in grads] == [[1.0, 0.0], [-1.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: discounted_probabilities(3, 1.1), "gamma=1.1"),
        (lambda: dense_logit(torch.zeros(2, 3), torch.ones(2, 3).long(), scale=0.0, clip=1.0), "scale=0.0"),
        (
            lambda: dense_logit(torch.zeros(2, 1), torch.zeros(2, 1).long(), scale=1.0, clip=1.0),
            "at least one drawn step",
        ),
        (lambda: list_mle(torch.zeros(1, 1), torch.zeros(1, 1)), "two images or more"),
        (lambda: step_preference(torch.zeros(1, 3), 0.3), "one candidate makes no pair"),
        (lambda: step_preference(torch.zeros(2, 3), 1.0), "threshold=1.0"),
        (lambda: spo_logit(torch.zeros(3), torch.zeros(3), beta=1.0, clip=1.0), "clip=1.0"),
        (lambda: spo_logit(torch.zeros(3), torch.zeros(3), beta=0.0, clip=0.1), "beta=0.0"),
        (lambda: diffusion_dro(*[torch.zeros(3)] * 4, margin=-1.0), "margin=-1.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
