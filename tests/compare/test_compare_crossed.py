"""The interval over training seeds and prompts: a balanced layout by hand, the variance it estimates, p-values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmalign.compare.crossed import crossed_mean, unit_values
from mmalign.compare.stats import compare_paired, mean_interval, p_value, summarise

# Mean squares by hand (three prompts, two seeds; mean 3.5, prompts 1.5, 4.5, 4.5, seeds 3, 4):
# prompts 2 (4 + 1 + 1) / 2 = 6, seeds 3 (1/4 + 1/4) / 1 = 1.5, rest (0 + 0 + 1 + 1 + 1 + 1) / 2 = 2.
VALUES = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0]])
T1, T2 = 12.706204736, 4.302652730  # 97.5 % quantiles of t with 1 and 2 degrees of freedom, from tables
HALF = (T1 * 1.5 / 6 + T2 * (6 - 2) / 6) / math.sqrt(1.5 / 6 + (6 - 2) / 6)


def test_a_balanced_layout_by_hand() -> None:
    estimate = crossed_mean(VALUES)
    assert (estimate.mean, estimate.seeds, estimate.prompts) == (3.5, 2, 3)
    assert estimate.of_seeds == pytest.approx(1.5 / 6)
    assert estimate.of_prompts == pytest.approx((6 - 2) / 6)
    assert estimate.interval() == pytest.approx((3.5 - HALF, 3.5 + HALF))


def test_comparisons_use_it_for_several_seeds_alone() -> None:
    # Two images a prompt and seed, which differ by 2: only their mean counts.
    columns = np.repeat(VALUES, 2, axis=1) + np.tile([-1.0, 1.0], 2)
    paired = compare_paired(columns, np.zeros_like(columns), replicas=2)
    assert paired.delta_ci95 == pytest.approx((3.5 - HALF, 3.5 + HALF))
    assert summarise(columns, replicas=2).ci95 == pytest.approx((3.5 - HALF, 3.5 + HALF))
    assert compare_paired(columns, columns - VALUES.mean(), replicas=2).ci95 == (1.0, 1.0)
    alone = compare_paired(columns, np.zeros_like(columns))
    assert alone.delta_ci95 == mean_interval(columns.mean(axis=1))


def test_the_variance_is_that_of_the_mean() -> None:
    """The mean over many draws of the estimate is seed / S + prompt / P + rest / (S P), up to what clipping adds."""
    rng = np.random.default_rng(0)
    seed_sd, prompt_sd, rest_sd, prompts, seeds = 0.5, 2.0, 1.0, 40, 3
    estimates, means = [], []
    for _ in range(4000):
        draw = rng.normal(0, prompt_sd, (prompts, 1)) + rng.normal(0, seed_sd, seeds)
        estimate = crossed_mean(draw + rng.normal(0, rest_sd, (prompts, seeds)))
        estimates.append(estimate.error**2)
        means.append(estimate.mean)
    truth = seed_sd**2 / seeds + prompt_sd**2 / prompts + rest_sd**2 / (seeds * prompts)
    assert np.mean(estimates) == pytest.approx(truth, rel=0.03)
    assert np.var(means) == pytest.approx(truth, rel=0.06)


def test_the_p_value_is_where_the_interval_ends() -> None:
    estimate = crossed_mean(VALUES)
    for level in (0.5, 0.95, 0.999):
        low, high = estimate.interval(level)
        assert estimate.p_value(low) == pytest.approx(1 - level) == estimate.p_value(high)
    assert estimate.p_value(3.5) == pytest.approx(1.0)
    assert estimate.p_value(1e17) == 1e-15  # as far as it is computed
    # Without any spread the mean is known.
    assert crossed_mean(np.ones((3, 2))).p_value() == 0.0 and crossed_mean(np.zeros((3, 2))).p_value() == 1.0


def test_the_bootstrap_has_a_p_value_that_agrees_with_its_interval() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, (60, 200)) + np.linspace(-0.6, 0.6, 200)
    for column in values.T:
        low, high = mean_interval(column, resamples=999)
        p = p_value(column[:, None], resamples=999)
        if abs(p - 0.05) > 0.004:  # nearer, the quantile lies between two resamples
            assert (p < 0.05) == (low > 0 or high < 0)
    assert p_value(np.ones((9, 1)), resamples=999) == 2 / 1000
    assert p_value(np.zeros((9, 1))) == 1.0 and p_value(np.ones((1, 1))) is None and p_value(np.ones((1, 3))) is None


def test_groups_weigh_by_their_rows() -> None:
    groups = [[0, 1, 2], [3]]
    rows = np.array([[1.0, 3.0], [2.0, 3.0], [3.0, 0.0], [6.0, 2.0]])
    by_group = unit_values(rows, groups)
    assert by_group.mean(axis=0) == pytest.approx(rows.mean(axis=0))
    # The linearised ratio: group totals around the mean, 2.5, times groups / rows.
    assert by_group[:, 0] == pytest.approx([(6 - 3 * 2.5) / 2 + 2.5, (6 - 2.5) / 2 + 2.5])
    units = ["a", "a", "a", "b"]
    assert summarise(rows, replicas=2, units=units).ci95 == pytest.approx(crossed_mean(by_group).interval())
    each = [str(row) for row in range(4)]
    assert summarise(rows, replicas=2, units=each).ci95 == pytest.approx(summarise(rows, replicas=2).ci95)
