"""The objectives of online methods as numbers, in float64: by hand, and on linear-Gaussian chains by closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.losses import clamped_policy_gradient, clipped_policy_gradient, gaussian_kl, prdp
from pipelines import gaussian_log_prob

POLICY_GRADIENTS = (clipped_policy_gradient, clamped_policy_gradient)


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Chain:
    """x[i+1] ~ N(a[i] x[i] + b[i], s[i]**2): the sampling chain of a pixel; `weights` holds a, b, log s."""

    def __init__(self, a: list[float], b: list[float], std: list[float]) -> None:
        self.weights = tensor(a, b, [math.log(s) for s in std]).requires_grad_()

    def sample(self, start: Tensor, noise: Tensor) -> Tensor:
        """Return the states [batch, steps + 1] that standard noise [batch, steps] leads to."""
        states = [start]
        for (a, b, log_std), z in zip(self.weights.detach().T, noise.T, strict=True):
            states.append(a * states[-1] + b + log_std.exp() * z)
        return torch.stack(states, dim=1)

    def log_prob(self, states: Tensor) -> Tensor:
        a, b, log_std = self.weights
        return torch.distributions.Normal(a * states[:, :-1] + b, log_std.exp()).log_prob(states[:, 1:])

    def marginals(self, mean: float, variance: float) -> list[tuple[Tensor, Tensor]]:
        """Return mean and variance of every state, given those of the first."""
        found = [(tensor(mean)[0], tensor(variance)[0])]
        for a, b, log_std in self.weights.T:
            m, v = found[-1]
            found.append((a * m + b, a.square() * v + (2 * log_std).exp()))
        return found


def reward_of(states: Tensor, linear: float, quadratic: float) -> Tensor:
    return linear * states[:, -1] + quadratic * states[:, -1].square()


def expected_reward(chain: Chain, linear: float, quadratic: float) -> Tensor:
    mean, variance = chain.marginals(0.0, 1.0)[-1]
    return linear * mean + quadratic * (variance + mean.square())


def expected_kl(chain: Chain, reference: Chain) -> Tensor:
    """Return KL(chain || reference) of a trajectory: its one-step KLs, averaged over the chain's own states."""
    total = torch.zeros((), dtype=torch.float64)
    ours, theirs = chain.weights.T, reference.weights.detach().T
    for (a, b, log_s), (a0, b0, log_s0), (m, v) in zip(ours, theirs, chain.marginals(0.0, 1.0)[:-1], strict=True):
        shift = (a - a0).square() * v + ((a - a0) * m + b - b0).square()
        total = total + log_s0 - log_s + ((2 * log_s).exp() + shift) / (2 * (2 * log_s0).exp()) - 0.5
    return total


def quadrature(variables: int) -> tuple[Tensor, Tensor]:
    """Return nodes [3**variables, variables] and weights: exact up to degree 5 in each normal variable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, repeat=variables)))
    products = np.array(list(itertools.product(weights / weights.sum(), repeat=variables))).prod(axis=1)
    return torch.from_numpy(grid), torch.from_numpy(products)


@pytest.fixture
def chains() -> tuple[Chain, Chain]:
    """A policy of three steps and its reference."""
    policy = Chain([0.9, 1.1, 0.8], [0.2, -0.1, 0.3], [0.5, 0.4, 0.3])
    return policy, Chain([0.8, 1.0, 0.9], [0.0, 0.1, 0.1], [0.6, 0.4, 0.2])


# PRDP: values


def test_prdp_is_zero_exactly_where_the_differences_agree() -> None:
    reward, beta = tensor(0.3, -1.2, 2.0, 0.7), 0.5
    steps = randn(4, 3, seed=0)
    # Each row's sum becomes reward / beta + 7: any constant of the prompt.
    agreeing = steps + ((reward / beta + 7) - steps.sum(1)).unsqueeze(1) / 3
    agree = prdp(agreeing, agreeing, reward, beta=beta, clip=0.1)
    torch.testing.assert_close(agree, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-24)
    # Moving one step of image 2 by 0.25 shows in its three pairs alone: (0,2), (1,2), (2,3).
    agreeing[2, 1] += 0.25
    moved = prdp(agreeing, agreeing, reward, beta=beta, clip=0.1)
    assert moved.tolist() == pytest.approx([0, 0.0625, 0, 0.0625, 0, 0.0625], abs=1e-12)


def test_prdp_of_the_reference_is_the_reward_difference_over_beta_in_the_order_of_combinations() -> None:
    zeros = torch.zeros(4, 5, dtype=torch.float64)
    loss = prdp(zeros, zeros, tensor(0.0, 1.0, 3.0, 7.0), beta=2.0, clip=1e-4)
    # Differences 1, 3, 7, 2, 6, 4, halved and squared.
    assert loss.tolist() == [0.25, 2.25, 12.25, 1.0, 9.0, 4.0]


def test_prdp_against_loops_in_plain_python() -> None:
    current, old, reward = 0.3 * randn(5, 4, seed=1), 0.3 * randn(5, 4, seed=2), randn(5, seed=3)
    beta, clip = 0.8, 0.25
    expected, clipped_wins = [], 0
    for a, b in itertools.combinations(range(5), 2):
        goal = (reward[a].item() - reward[b].item()) / beta
        pairs = [zip(current[i].tolist(), old[i].tolist(), strict=True) for i in (a, b)]
        sums = [sum(min(max(new, was - clip), was + clip) for new, was in pair) for pair in pairs]
        free = (sum(current[a].tolist()) - sum(current[b].tolist()) - goal) ** 2
        clipped = (sums[0] - sums[1] - goal) ** 2
        clipped_wins += clipped > free
        expected.append(max(free, clipped))
    assert 0 < clipped_wins < 10  # both branches are met
    assert prdp(current, old, reward, beta=beta, clip=clip).tolist() == pytest.approx(expected, rel=1e-12)


def test_prdp_does_not_see_a_constant_of_the_prompt() -> None:
    current, old, reward = randn(6, 3, seed=4), randn(6, 3, seed=5), randn(6, seed=6)
    loss = prdp(current, old, reward, beta=0.3, clip=0.2)
    torch.testing.assert_close(prdp(current, old, reward + 100, beta=0.3, clip=0.2), loss, rtol=1e-11, atol=0)


def test_prdp_on_means_over_dimensions_is_that_on_sums_with_beta_and_clip_per_dimension() -> None:
    sums, old, reward = 5 * randn(4, 3, seed=7), 5 * randn(4, 3, seed=8), randn(4, seed=9)
    dimensions = 4 * 8 * 8
    on_sums = prdp(sums, old, reward, beta=0.1, clip=2.0)
    on_means = prdp(sums / dimensions, old / dimensions, reward, beta=0.1 * dimensions, clip=2.0 / dimensions)
    torch.testing.assert_close(on_means * dimensions**2, on_sums, rtol=1e-12, atol=0)
    assert (on_sums > prdp(sums, old, reward, beta=0.1, clip=math.inf) + 1e-6).any()  # the clip had work to do


# PRDP: gradients


def test_at_the_old_policy_the_clip_changes_neither_loss_nor_gradient() -> None:
    current, reward = randn(4, 3, seed=10).requires_grad_(), randn(4, seed=11)
    results = []
    for clip in (1e-6, math.inf):
        loss = prdp(current, current.detach(), reward, beta=0.5, clip=clip)
        results.append((loss, *torch.autograd.grad(loss.sum(), current)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    # Derivative of the sum of squares: 2 * (B * residual - sum of residuals), the same for every step.
    residual = current.detach().sum(1) - reward / 0.5
    expected = 2 * (4 * residual - residual.sum())
    torch.testing.assert_close(results[0][1], expected.unsqueeze(1).expand(4, 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("first", "second", "reward", "loss", "first_gradient", "second_gradient"),
    [
        # R = 0.25 of a goal of 1: l = 0.75**2; clipped to 0.1 + 0.05 - 0.1: l_clip = 0.95**2 wins.
        ([0.5, 0.05, -0.3], [0.0, 0.0, 0.0], 1.0, 0.9025, [0, -1.9, 0], [1.9, 1.9, 1.9]),
        # Every step outside: R_a - R_b = 2.2 of a goal of 3; clipped 0.6: nothing moves.
        ([0.5, 0.4, 0.3], [-0.5, -0.2, -0.3], 3.0, 5.76, [0, 0, 0], [0, 0, 0]),
        # Overshot: R = 0.85 where the goal is 0; l = 0.7225 beats l_clip = 0.25**2 and pulls on every step.
        ([0.5, 0.05, 0.3], [0.0, 0.0, 0.0], 0.0, 0.7225, [1.7, 1.7, 1.7], [-1.7, -1.7, -1.7]),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_prdp_clip_by_hand(first, second, reward, loss, first_gradient, second_gradient, shift) -> None:  # type: ignore[no-untyped-def]
    # The same old log-ratio on both images cancels in the pair and moves the window along.
    current = (tensor(first, second) + shift).requires_grad_()
    old = torch.full((2, 3), shift, dtype=torch.float64)
    result = prdp(current, old, tensor(reward, 0.0), beta=1.0, clip=0.1)
    assert result.tolist() == pytest.approx([loss], rel=1e-12)
    (gradient,) = torch.autograd.grad(result.sum(), current)
    assert gradient.tolist() == [pytest.approx(first_gradient, abs=1e-12), pytest.approx(second_gradient, abs=1e-12)]
    held_back = tensor(first_gradient, second_gradient) == 0
    assert torch.equal(gradient[held_back], torch.zeros_like(gradient[held_back]))


def test_prdp_gradient_reaches_the_log_ratios_alone_and_equals_finite_differences() -> None:
    current, old, reward = (0.3 * randn(4, 3, seed=s) for s in (12, 13, 14))
    current.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prdp(x, old, reward[:, 0], beta=0.7, clip=0.2), current)
    others = [old.clone().requires_grad_(), reward[:, 0].clone().requires_grad_()]
    prdp(current, *others, beta=0.7, clip=0.2).sum().backward()
    assert [x.grad for x in others] == [None, None]


def test_on_its_own_samples_prdp_descends_reward_minus_beta_kl(chains: tuple[Chain, Chain]) -> None:
    policy, reference = chains
    beta, linear, quadratic = 0.7, 0.9, -0.4
    nodes, weights = quadrature(4)
    states = policy.sample(nodes[:, 0], nodes[:, 1:])
    log_ratio = policy.log_prob(states) - reference.log_prob(states).detach()
    losses = prdp(log_ratio, log_ratio.detach(), reward_of(states, linear, quadratic), beta=beta, clip=1e-4)
    # Two independent images: the ordered pairs (a, b) and (b, a) cost the same, (a, a) nothing.
    pair_weights = torch.stack([2 * weights[a] * weights[b] for a, b in itertools.combinations(range(81), 2)])
    (gradient,) = torch.autograd.grad((pair_weights * losses).sum(), policy.weights)
    objective = expected_reward(policy, linear, quadratic) - beta * expected_kl(policy, reference)
    (exact,) = torch.autograd.grad(objective, policy.weights)
    assert exact.abs().min() > 1e-3
    torch.testing.assert_close(gradient, -4 / beta * exact, rtol=1e-10, atol=1e-12)


def test_prdp_trains_a_chain_to_the_tilted_gaussian() -> None:
    reference = Chain([0.8, 1.0], [0.0, 0.1], [0.6, 0.4])
    policy = Chain([0.8, 1.0], [0.0, 0.1], [0.6, 0.4])
    beta, linear, quadratic, start = 0.5, 0.6, -0.4, 0.5
    mean, variance = reference.marginals(start, 0.0)[-1]
    # N(M, V) * exp((u x + q x**2) / beta): precisions add up, and so do precision-weighted means.
    precision = 1 / variance - 2 * quadratic / beta
    expected_mean, expected_variance = (mean / variance + linear / beta) / precision, 1 / precision
    assert expected_variance < 0.6 * variance and expected_mean - mean > 0.1  # the goal is not the reference

    optimizer = torch.optim.Adam([policy.weights], lr=0.03)
    source = torch.Generator().manual_seed(0)
    noise_options = {"generator": source, "dtype": torch.float64}
    course = []
    for step in range(150):
        states = policy.sample(torch.full((16,), start, dtype=torch.float64), torch.randn(16, 2, **noise_options))
        reference_log_prob = reference.log_prob(states).detach()
        old, reward = policy.log_prob(states).detach() - reference_log_prob, reward_of(states, linear, quadratic)
        for _ in range(4):
            loss = prdp(policy.log_prob(states) - reference_log_prob, old, reward, beta=beta, clip=0.1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        course.append(loss.item())
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 150)
    mean, variance = policy.marginals(start, 0.0)[-1]
    assert mean.item() == pytest.approx(expected_mean.item(), abs=1e-5)
    assert variance.item() == pytest.approx(expected_variance.item(), abs=1e-5)
    # The optimum answers for every trajectory, likely or not.
    states = torch.cat([torch.full((64, 1), start, dtype=torch.float64), 2 * torch.randn(64, 2, **noise_options)], 1)
    log_ratio = (policy.log_prob(states) - reference.log_prob(states)).detach()
    everywhere = prdp(log_ratio, log_ratio, reward_of(states, linear, quadratic), beta=beta, clip=0.1)
    assert everywhere.mean().item() < 1e-8 and course[0] > 0.1


# Policy gradients


@pytest.mark.parametrize(
    ("advantage", "ratio", "ppo", "ppo_gradient", "clamped", "clamped_gradient"),
    [
        (2.0, 1.3, -2.4, 0.0, -2.4, 0.0),  # moved far enough where it should: no more
        (2.0, 0.7, -1.4, -1.4, -1.6, 0.0),  # moved the wrong way: PPO brings it back, the clamp does not
        (-2.0, 1.3, 2.6, 2.6, 2.4, 0.0),
        (-2.0, 0.7, 1.6, 0.0, 1.6, 0.0),
        (2.0, 1.05, -2.1, -2.1, -2.1, -2.1),  # inside, where both are -A rho
        (-2.0, 0.95, 1.9, 1.9, 1.9, 1.9),
        (0.0, 1.3, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_policy_gradients_by_hand(advantage, ratio, ppo, ppo_gradient, clamped, clamped_gradient) -> None:  # type: ignore[no-untyped-def]
    expected = [(ppo, ppo_gradient), (clamped, clamped_gradient)]
    for function, (value, gradient) in zip(POLICY_GRADIENTS, expected, strict=True):
        log_prob = tensor(math.log(ratio) - 3.0).requires_grad_()
        loss = function(log_prob, tensor(-3.0), tensor(advantage), clip=0.2)
        loss.sum().backward()
        assert log_prob.grad is not None
        assert loss.item() == pytest.approx(value, abs=1e-12)
        assert log_prob.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("function", POLICY_GRADIENTS)
def test_at_the_old_policy_the_gradient_is_minus_advantage_times_the_score(function) -> None:  # type: ignore[no-untyped-def]
    log_prob, advantage = randn(4, 3, seed=20).requires_grad_(), randn(4, 1, seed=21).requires_grad_()
    old = log_prob.detach().clone().requires_grad_()
    loss = function(log_prob, old, advantage, clip=1e-4)
    torch.testing.assert_close(loss, -advantage.expand(4, 3))
    loss.sum().backward()
    assert log_prob.grad is not None and old.grad is None and advantage.grad is None
    torch.testing.assert_close(log_prob.grad, -advantage.detach().expand(4, 3), rtol=1e-15, atol=0)


def test_ddpo_descends_the_expected_reward(chains: tuple[Chain, Chain]) -> None:
    policy, _ = chains
    linear, quadratic = 0.9, -0.4
    nodes, weights = quadrature(4)
    states = policy.sample(nodes[:, 0], nodes[:, 1:])
    log_prob = policy.log_prob(states)
    reward = reward_of(states, linear, quadratic)
    mean = (weights * reward).sum()
    std = (weights * (reward - mean).square()).sum().sqrt()
    advantage = ((reward - mean) / std).unsqueeze(1)
    loss = (weights.unsqueeze(1) * clipped_policy_gradient(log_prob, log_prob.detach(), advantage, clip=1e-4)).sum()
    (gradient,) = torch.autograd.grad(loss, policy.weights)
    (exact,) = torch.autograd.grad(expected_reward(policy, linear, quadratic), policy.weights)
    torch.testing.assert_close(gradient, -exact / std, rtol=1e-10, atol=1e-12)


def test_ddpo_equals_reinforce_on_samples(chains: tuple[Chain, Chain]) -> None:
    policy, _ = chains
    noise = randn(200_000, 4, seed=22)
    states = policy.sample(noise[:, 0], noise[:, 1:])
    reward = reward_of(states, 0.9, -0.4)
    advantage = ((reward - reward.mean()) / reward.std()).unsqueeze(1)
    log_prob = policy.log_prob(states)
    loss = clipped_policy_gradient(log_prob, log_prob.detach(), advantage, clip=1e-4).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, policy.weights)
    # The scores of N(a x + b, s**2) with respect to a, b and log s: z x / s, z / s and z**2 - 1.
    std, z = policy.weights[2].detach().exp(), noise[:, 1:]
    scores = torch.stack([z * states[:, :-1] / std, z / std, z.square() - 1])
    torch.testing.assert_close(gradient, -(advantage * scores).mean(dim=1), rtol=1e-9, atol=1e-12)
    (exact,) = torch.autograd.grad(expected_reward(policy, 0.9, -0.4), policy.weights)
    assert torch.cosine_similarity(gradient.flatten(), -exact.flatten(), dim=0).item() > 0.999


# The KL of one step


def test_gaussian_kl_is_the_mean_over_dimensions_of_the_true_one() -> None:
    mean, reference = randn(3, 4, 5, 5, seed=30), randn(3, 4, 5, 5, seed=31)
    std = tensor(0.1, 0.7, 2.0)
    normals = [torch.distributions.Normal(m, std.view(3, 1, 1, 1)) for m in (mean, reference)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).sum(1) / 100
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian_kl(mean, reference, std.view(3, 1, 1, 1)), expected, rtol=1e-12, atol=0)


def test_gaussian_kl_is_the_expected_difference_of_the_samplers_log_probs() -> None:
    # The difference is linear in the noise, so opposite noises average to the expectation exactly.
    mean, reference, noise = (randn(2, 3, 4, 4, seed=s) for s in (32, 33, 34))
    std = tensor(0.3, 1.5)
    differences = []
    for sign in (1, -1):
        sample = mean + sign * std.view(2, 1, 1, 1) * noise
        differences.append(gaussian_log_prob(sample, mean, std) - gaussian_log_prob(sample, reference, std))
    torch.testing.assert_close(gaussian_kl(mean, reference, std), sum(differences) / 2, rtol=1e-11, atol=0)


def test_gaussian_kl_of_a_deterministic_step_is_zero_with_a_finite_gradient() -> None:
    mean = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    divergence = gaussian_kl(mean, torch.zeros(2, 3, dtype=torch.float64), tensor(0.0, 0.5))
    assert divergence.tolist() == [0.0, 2.0]  # 1 / (2 * 0.25)
    divergence.sum().backward()
    assert mean.grad is not None and mean.grad.tolist() == [[0.0] * 3, pytest.approx([4 / 3] * 3)]


# Precision and errors


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_before_any_ratio(half: torch.dtype) -> None:
    rows, column = torch.full((2, 3), 0.5, dtype=half), torch.tensor([1.0, 0.0], dtype=half)
    assert prdp(rows, rows, column, beta=1.0, clip=1e-4).dtype == torch.float32
    for function in POLICY_GRADIENTS:
        assert function(rows, rows, column.unsqueeze(1), clip=1e-4).dtype == torch.float32
    assert gaussian_kl(rows, rows, column).dtype == torch.float32


@pytest.mark.parametrize(
    ("beta", "clip", "name"), [(0.0, 1.0, "beta=0"), (math.nan, 1.0, "beta"), (1.0, 0.0, "clip=0")]
)
def test_prdp_refuses_what_is_not_positive(beta: float, clip: float, name: str) -> None:
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=name):
        prdp(rows, rows, torch.zeros(2), beta=beta, clip=clip)


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_fit_are_named() -> None:
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 3\), \(3,\)"):
        prdp(rows, rows, torch.zeros(3), beta=1.0, clip=1.0)
    with pytest.raises(ValueError, match="at least two images"):
        prdp(rows[:1], rows[:1], torch.zeros(1), beta=1.0, clip=1.0)
    for function in POLICY_GRADIENTS:
        for before, advantage in ((rows, torch.zeros(2)), (rows, torch.zeros(4, 2, 3)), (rows[:1], rows)):
            with pytest.raises(ValueError, match="broadcast"):
                function(rows, before, advantage, clip=1.0)
        with pytest.raises(ValueError, match="clip=-1"):
            function(rows, rows, rows, clip=-1.0)
    with pytest.raises(ValueError, match="they must be equal"):
        gaussian_kl(rows, rows[:1], torch.ones(2))
