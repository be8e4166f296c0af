"""Flow-GRPO and relatives as numbers, in float64: against numpy by hand, and against published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmalign.losses import (
    flash_weights,
    gaussian_kl,
    guard_log_ratio,
    masked_policy_gradient,
    squared_error_log_prob,
    temp_weights,
)
from pipelines import gaussian_log_prob

RNG = np.random.default_rng(0)
SHAPE = (4, 3, 2, 5)
STD = np.array([0.7, 0.3, 0.05, 1.3])
OLD = RNG.normal(size=SHAPE)
NOISE = RNG.normal(size=SHAPE)
CHANGE = 0.02 * RNG.normal(size=SHAPE)
AFTER = OLD + STD[:, None, None, None] * NOISE


def t(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def over_dimensions(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).mean(1)


def gaussian_log_ratio() -> np.ndarray:
    found = [gaussian_log_prob(t(AFTER), t(mean), t(STD)) for mean in (OLD + CHANGE, OLD)]
    return (found[0] - found[1]).numpy()


def test_gaussian_log_ratio_is_noise_times_change_less_the_biased_square() -> None:
    expected = over_dimensions(NOISE * CHANGE) / STD - over_dimensions(CHANGE**2) / (2 * STD**2)
    np.testing.assert_allclose(gaussian_log_ratio(), expected, rtol=1e-11)


def test_guards_log_ratio_is_the_mean_of_noise_times_change() -> None:
    ratio = guard_log_ratio(t(AFTER), t(OLD + CHANGE), t(OLD), t(STD)).numpy()
    np.testing.assert_allclose(ratio, over_dimensions(NOISE * CHANGE), rtol=1e-11)
    # As the published code has it: the Gaussian log-ratio plus its bias, times std.
    published = (gaussian_log_ratio() + over_dimensions(CHANGE**2) / (2 * STD**2)) * STD
    np.testing.assert_allclose(ratio, published, rtol=1e-9)


def test_guard_has_no_gradient_to_the_old_mean_and_its_own_is_the_noise() -> None:
    mean, old = t(OLD + CHANGE).requires_grad_(), t(OLD).requires_grad_()
    (found,) = torch.autograd.grad(guard_log_ratio(t(AFTER), mean, old, t(STD)).sum(), mean)
    np.testing.assert_allclose(found.numpy(), NOISE / math.prod(SHAPE[1:]), rtol=1e-11)
    assert not guard_log_ratio(t(AFTER), t(OLD), old, t(STD)).requires_grad


def test_cps_log_ratio_is_twice_the_variance_times_the_gaussians() -> None:
    ratio = squared_error_log_prob(t(AFTER), t(OLD + CHANGE)) - squared_error_log_prob(t(AFTER), t(OLD))
    np.testing.assert_allclose(ratio.numpy(), 2 * STD**2 * gaussian_log_ratio(), rtol=1e-9)
    np.testing.assert_allclose(
        squared_error_log_prob(t(AFTER), t(OLD)).numpy(), -over_dimensions((AFTER - OLD) ** 2), rtol=1e-12
    )


def test_the_codes_kl_is_the_duration_times_the_exact_one() -> None:
    """Flow-GRPO's step has std s sqrt|dt|, and its code divides the squared difference of means by 2 s^2."""
    duration = np.array([0.04, 0.05, 0.2, 0.01])
    s = STD / np.sqrt(duration)
    exact = gaussian_kl(t(OLD), t(OLD + CHANGE), t(STD)).numpy()
    np.testing.assert_allclose(exact, over_dimensions(CHANGE**2) / (2 * s**2 * duration), rtol=1e-12)
    np.testing.assert_allclose(duration * exact, over_dimensions(CHANGE**2) / (2 * s**2), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "advantage", "divergence", "kept"),
    [
        (0.1, 1.0, 0.5, False),  # further in the direction of the advantage, and beyond the limit
        (-0.1, -1.0, 0.5, False),
        (0.1, 1.0, 0.2, False),  # the limit itself is beyond
        (0.1, 1.0, 0.1, True),  # within the region
        (-0.1, 1.0, 0.5, True),  # on the way back
        (0.1, -1.0, 0.5, True),
        (0.0, 1.0, 0.0, True),
    ],
)
def test_dppo_masks_what_has_left_the_region_and_goes_on(
    change: float, advantage: float, divergence: float, kept: bool
) -> None:
    now = t([0.3 + change]).requires_grad_()
    loss = masked_policy_gradient(now, t([0.3]), t([advantage]), t([divergence]), limit=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), now)
    expected = -advantage * math.exp(change) if kept else 0.0
    assert loss.item() == pytest.approx(expected, abs=1e-15) and gradient.item() == pytest.approx(expected, abs=1e-15)


def test_dppo_gives_no_gradient_to_the_divergence_and_refuses_a_limit_of_0() -> None:
    now, divergence = t([0.1, 0.2]).requires_grad_(), t([0.5, 0.1]).requires_grad_()
    loss = masked_policy_gradient(now, t([0.0, 0.0]), t([1.0, 1.0]), divergence, limit=0.2)
    assert torch.autograd.grad(loss.sum(), divergence, allow_unused=True, retain_graph=True) == (None,)
    with pytest.raises(ValueError, match="clip=0.0"):
        masked_policy_gradient(now, now, t([1.0, 1.0]), divergence, limit=0.0)


GRID = np.array([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])
"""SD3's levels of 10 steps, to four digits."""


def test_temp_weights_are_the_published_numbers() -> None:
    stds = t([0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063])
    expected = [1.575, 1.672, 1.206, 1.003, 0.882, 0.794, 0.718, 0.634, 0.507, 0.014]
    assert temp_weights(stds).tolist() == pytest.approx(expected, abs=6e-4)


def test_flash_weights_are_the_codes_closed_form_over_its_mean() -> None:
    """1 / (sqrt|dt| / s + s sqrt|dt| (1 - sigma) / (2 sigma)), in units of its mean over the first half."""
    sigma, duration = GRID[:-1], -np.diff(GRID)
    s = 0.7 * np.sqrt(sigma / (1 - np.where(sigma == 1, GRID[1], sigma)))
    published = 1 / (np.sqrt(duration) / s + s * np.sqrt(duration) * (1 - sigma) / (2 * sigma))
    slopes = (1 + s**2 * (1 - sigma) / (2 * sigma)) * duration
    stds = s * np.sqrt(duration)
    found = flash_weights(t(stds), t(slopes), t(stds / slopes)[:5])
    np.testing.assert_allclose(found.numpy(), published / published[:5].mean(), rtol=1e-11)
    assert found[:5].mean().item() == pytest.approx(1.0)
