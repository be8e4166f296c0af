"""DiffusionNFT in float64: by loops in plain Python, by the quadratic it is, and by closed forms of its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mmalign.losses import nft, old_policy_decay, optimality
from pipelines.noise import NoiseProcess

Q = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
SIGMA = torch.tensor([0.9, 0.1, 0.6, 0.4, 1.0], dtype=torch.float64)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Policy, old policy and target, [5, 2, 3]."""
    policy, old, target = (randn(5, 2, 3, seed=seed) for seed in (1, 2, 3))
    return policy.requires_grad_(), old, target


def gradient(losses: Tensor, policy: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(losses.sum(), policy)
    return found


@pytest.mark.parametrize("normalise", [True, False])
def test_against_loops_in_plain_python(drawn: tuple[Tensor, Tensor, Tensor], normalise: bool) -> None:
    """Through the clean samples of flow matching, x0 = x - sigma v, as the authors' code has it."""
    policy, old, target = drawn
    beta, x = 0.3, randn(5, 2, 3, seed=4)
    expected = []
    for row in range(5):
        s, q = float(SIGMA[row]), float(Q[row])
        v, o, u, noisy = (one[row].flatten().tolist() for one in (policy.detach(), old, target, x))
        clean = [a - s * b for a, b in zip(noisy, u, strict=True)]
        sides = []
        for plus in (True, False):
            implied = [
                beta * a + (1 - beta) * b if plus else (1 + beta) * b - beta * a for a, b in zip(v, o, strict=True)
            ]
            miss = [a - s * b - c for a, b, c in zip(noisy, implied, clean, strict=True)]
            weight = max(1e-5, sum(map(abs, miss)) / 6) if normalise else 1.0
            sides.append(sum(m * m for m in miss) / 6 / weight)
        expected.append((q * sides[0] + (1 - q) * sides[1]) / beta)
    found = nft(policy, old, target, SIGMA, Q, beta=beta, normalise=normalise)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()]
)
def test_sigma_times_the_error_of_the_velocity_is_that_of_the_clean_sample(scheduler: object) -> None:
    process = NoiseProcess.from_scheduler(scheduler)
    x0, noise, v = (randn(4, 3, 2, 2, seed=seed) for seed in (1, 2, 3))
    t = torch.tensor([1, 300, 700, 999])
    x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    sigma = process.coefficients(t, x0)[1]
    torch.testing.assert_close(process.to_x0(x_t, v, t) - x0, sigma * (target - v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_without_the_normaliser_it_is_a_step_and_a_trust_region(
    drawn: tuple[Tensor, Tensor, Tensor], beta: float
) -> None:
    policy, old, target = drawn
    moved = policy.detach() - old
    inner, square = (moved * (old - target)).flatten(1).mean(1), moved.square().flatten(1).mean(1)
    fixed = (old - target).square().flatten(1).mean(1)
    expected = SIGMA.square() * (fixed / beta + 2 * (2 * Q - 1) * inner + beta * square)
    found = nft(policy, old, target, SIGMA, Q, beta=beta, normalise=False)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-14)


def test_an_average_sample_pulls_nowhere_from_the_old_policy(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    _, old, target = drawn
    policy, half = old.clone().requires_grad_(), torch.full((5,), 0.5, dtype=torch.float64)
    for normalise in (True, False):
        losses = nft(policy, old, target, SIGMA, half, beta=0.7, normalise=normalise)
        assert gradient(losses, policy).abs().max() < 1e-15


@pytest.mark.parametrize("normalise", [True, False])
def test_at_the_old_policy_the_value_ignores_the_reward_and_the_gradient_ignores_beta(
    drawn: tuple[Tensor, Tensor, Tensor], normalise: bool
) -> None:
    """The gradient is (2q - 1) times that of the sample's own error, with the normaliser held constant."""
    _, old, target = drawn
    policy = old.clone().requires_grad_()
    weight = (SIGMA * (old - target).abs().flatten(1).mean(1)) if normalise else torch.ones_like(SIGMA)
    factor = (2 * Q - 1) * 2 * SIGMA.square() / (6 * weight)
    expected = factor.reshape(5, 1, 1) * (old - target)
    for beta in (0.1, 1.0, 4.0):
        losses = nft(policy, old, target, SIGMA, Q, beta=beta, normalise=normalise)
        again = nft(policy, old, target, SIGMA, 1 - Q, beta=beta, normalise=normalise)
        torch.testing.assert_close(losses, again, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient(losses, policy), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_the_minimum_is_a_step_to_the_target_as_long_as_the_sample_is_good(
    drawn: tuple[Tensor, Tensor, Tensor], beta: float
) -> None:
    _, old, target = drawn
    best = old + (2 * Q - 1).reshape(5, 1, 1) * (target - old) / beta
    policy = best.clone().requires_grad_()
    losses = nft(policy, old, target, SIGMA, Q, beta=beta, normalise=False)
    assert gradient(losses, policy).abs().max() < 1e-14
    for seed in range(3):
        beside = best + 0.1 * randn(5, 2, 3, seed=10 + seed)
        assert (nft(beside, old, target, SIGMA, Q, beta=beta, normalise=False) > losses).all()
    # At beta 1 a best sample is fitted itself, and a worst one mirrored at the old policy.
    ends = nft(target, old, target, SIGMA, torch.ones_like(Q), beta=1.0, normalise=False)
    mirrored = nft(2 * old - target, old, target, SIGMA, torch.zeros_like(Q), beta=1.0, normalise=False)
    assert ends.abs().max() < 1e-28 and mirrored.abs().max() < 1e-28


@pytest.mark.parametrize("normalise", [True, False])
def test_good_and_bad_swap_with_the_mirrored_policy(drawn: tuple[Tensor, Tensor, Tensor], normalise: bool) -> None:
    policy, old, target = drawn
    one = nft(policy, old, target, SIGMA, Q, beta=0.6, normalise=normalise)
    other = nft(2 * old - policy, old, target, SIGMA, 1 - Q, beta=0.6, normalise=normalise)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_gradient_is_the_closed_form_with_constant_normalisers(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    policy, old, target = drawn
    beta, level, q = 0.4, SIGMA.reshape(5, 1, 1), Q.reshape(5, 1, 1)
    plus = level * (beta * policy.detach() + (1 - beta) * old - target)
    minus = level * ((1 + beta) * old - beta * policy.detach() - target)
    mean_abs = [side.abs().flatten(1).mean(1).reshape(5, 1, 1) for side in (plus, minus)]
    expected = 2 * level / 6 * (q * plus / mean_abs[0] - (1 - q) * minus / mean_abs[1])
    losses = nft(policy, old, target, SIGMA, Q, beta=beta)
    torch.testing.assert_close(gradient(losses, policy), expected, rtol=1e-12, atol=1e-14)


def test_gradient_equals_finite_differences_and_reaches_the_policy_alone(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    policy, old, target = drawn
    assert torch.autograd.gradcheck(lambda v: nft(v, old, target, SIGMA, Q, beta=0.5, normalise=False), policy)
    others = [one.clone().requires_grad_() for one in (old, target, SIGMA, Q)]
    nft(policy, *others, beta=0.5).sum().backward()
    assert policy.grad is not None and all(one.grad is None for one in others)


def test_a_perfect_fit_is_divided_by_the_least_error() -> None:
    v = torch.zeros(1, 4, dtype=torch.float64)
    tiny = torch.full_like(v, 1e-6)
    one = torch.ones(1, dtype=torch.float64)
    assert float(nft(v, v, tiny, one, one, beta=1.0)) == pytest.approx(1e-12 / 1e-5)
    assert nft(v.half(), v.half(), tiny.half(), one, one, beta=1.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.25, 0.5, 0.6, 1.0]),
        ("positive", [0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative", [0.0, 0.25, 0.5, 0.5, 0.5]),
        ("one", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality_by_hand(mode: str, expected: list[float]) -> None:
    """With clip 5: -9 and 7 are beyond it, -2.5 / 10 + 1/2 is 1/4."""
    advantages = torch.tensor([-9.0, -2.5, 0.0, 1.0, 7.0], dtype=torch.float64)
    assert optimality(advantages, clip=5.0, mode=mode).tolist() == pytest.approx(expected)


def test_the_clip_of_paper_and_code_differ_in_the_trust_region_alone(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """clip * loss: the same pull of the reward at the old policy, and clip times the hold."""
    _, old, target = drawn
    advantages = torch.tensor([-0.9, -0.3, 0.0, 0.5, 0.8], dtype=torch.float64)
    pulls, holds = [], []
    for clip in (1.0, 5.0):
        policy = old.clone().requires_grad_()
        q = optimality(advantages, clip=clip)
        pulls.append(gradient(clip * nft(policy, old, target, SIGMA, q, beta=1.0, normalise=False), policy))
        moved = old + 0.5
        both = nft(moved, old, target, SIGMA, q, beta=1.0, normalise=False)
        mirrored = nft(2 * old - moved, old, target, SIGMA, q, beta=1.0, normalise=False)
        still = nft(old, old, target, SIGMA, q, beta=1.0, normalise=False)
        holds.append(clip * (both + mirrored - 2 * still) / 2)
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(holds[1], 5 * holds[0], rtol=1e-10, atol=1e-14)


def test_decay_of_the_published_schedules() -> None:
    assert [old_policy_decay(k) for k in (0, 7, 10_000)] == [0.0, 0.0, 0.0]
    slow = [old_policy_decay(k, rate=0.001, limit=0.5) for k in (0, 1, 499, 500, 9_000)]
    assert slow == pytest.approx([0.0, 0.001, 0.499, 0.5, 0.5])
    late = [old_policy_decay(k, flat=75, rate=0.0075, limit=0.999) for k in (74, 75, 76, 208, 209)]
    assert late == pytest.approx([0.0, 0.0, 0.0075, 0.9975, 0.999])


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_refused() -> None:
    v, one = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="beta=0.0 must be positive"):
        nft(v, v, v, one, one, beta=0.0)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\), \(2, 3\), \(2, 3\), \(2,\), \(3,\)"):
        nft(v, v, v, one, torch.ones(3), beta=1.0)
    with pytest.raises(ValueError, match="outside"):
        nft(v, v, v, one, 2 * one, beta=1.0)
    with pytest.raises(ValueError, match="outside"):
        nft(v, v, v, one, math.nan * one, beta=1.0)
    with pytest.raises(ValueError, match="mode='some'"):
        optimality(one, clip=1.0, mode="some")
    with pytest.raises(ValueError, match="clip=0.0"):
        optimality(one, clip=0.0)
    with pytest.raises(ValueError, match="limit=1"):
        old_policy_decay(3, limit=1.0)
