"""Advantage weighted matching in float64: by hand, by the gradient of the error, and by its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.losses import awm_log_prob, clipped_policy_gradient
from mmalign.losses.awm import Weighting

T = torch.tensor([0.9, 0.1, 0.6, 0.4, 1.0], dtype=torch.float64)
A = torch.tensor([1.0, -0.3, 0.0, 0.7, -1.0], dtype=torch.float64)
EXPECTED = {
    "uniform": lambda error, t: -error,
    "t": lambda error, t: -t * error,
    "t2": lambda error, t: -t * t * error,
    "huber": lambda error, t: -t * (math.sqrt(error + 1e-10) - 1e-5),
    "ghuber": lambda error, t: -t / 0.25 * ((error + 1e-10) ** 0.25 - 1e-10**0.25),
}
WEIGHTS = {
    "uniform": lambda error, t: 1.0,
    "t": lambda error, t: t,
    "t2": lambda error, t: t * t,
    "huber": lambda error, t: t / (2 * math.sqrt(error + 1e-10)),
    "ghuber": lambda error, t: t * (error + 1e-10) ** -0.75,
}


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    """Policy and target, [5, 2, 3]."""
    policy, target = (
        torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2)
    )
    return policy.requires_grad_(), target


def errors_of(policy: Tensor, target: Tensor) -> list[float]:
    rows = ((policy - target) ** 2).flatten(1).tolist()
    return [sum(row) / len(row) for row in rows]


@pytest.mark.parametrize("weighting", EXPECTED)
def test_against_plain_python(drawn: tuple[Tensor, Tensor], weighting: Weighting) -> None:
    policy, target = drawn
    found = awm_log_prob(policy, target, T, weighting=weighting)
    expected = [EXPECTED[weighting](*one) for one in zip(errors_of(policy, target), T.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert awm_log_prob(target, target, T, weighting=weighting).tolist() == pytest.approx([0] * 5, abs=1e-15)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_gradient_at_ratio_one_is_advantage_times_weight_times_that_of_the_error(
    drawn: tuple[Tensor, Tensor], weighting: Weighting
) -> None:
    policy, target = drawn
    log_prob = awm_log_prob(policy, target, T, weighting=weighting)
    losses = clipped_policy_gradient(log_prob, log_prob.detach(), A, clip=1.0)
    assert torch.equal(losses, -A)  # the ratio is 1 to the bit
    (found,) = torch.autograd.grad(losses.sum(), policy)
    weights = [WEIGHTS[weighting](*one) for one in zip(errors_of(policy, target), T.tolist(), strict=True)]
    of_error = 2 * (policy - target).detach() / 6
    expected = (A * torch.tensor(weights, dtype=torch.float64)).reshape(-1, 1, 1) * of_error
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_power_leads_from_roots_to_the_error_itself(drawn: tuple[Tensor, Tensor]) -> None:
    policy, target = drawn
    plain = awm_log_prob(policy, target, T, weighting="t")
    for power, tolerance in ((1.0, 1e-9), (1 - 1e-6, 1e-5), (1 - 1e-3, 1e-2)):
        found = awm_log_prob(policy, target, T, weighting="ghuber", power=power)
        torch.testing.assert_close(found, plain, rtol=tolerance, atol=0)
    huber = awm_log_prob(policy, target, T, weighting="huber")
    torch.testing.assert_close(awm_log_prob(policy, target, T, power=0.5), 2 * huber, rtol=1e-12, atol=0)


def test_half_precision_is_summed_in_double_and_gradients_reach_the_policy_alone() -> None:
    policy = torch.full((1, 65536), 300.0, dtype=torch.float16, requires_grad=True)  # its square overflows in half
    target = torch.zeros(1, 65536, dtype=torch.float16, requires_grad=True)
    t = torch.ones(1, requires_grad=True)
    found = awm_log_prob(policy, target, t, weighting="uniform")
    assert found.dtype == torch.float64 and found.item() == -90000
    found.sum().backward()
    assert policy.grad is not None and target.grad is None and t.grad is None


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_named() -> None:
    v, t = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="power=1.5"):
        awm_log_prob(v, v, t, power=1.5)
    with pytest.raises(ValueError, match="weighting='t3' is not known"):
        awm_log_prob(v, v, t, weighting="t3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        awm_log_prob(v, v, torch.zeros(3))
