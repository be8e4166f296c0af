"""Paired statistics: hand-computed numbers, the coverage of the intervals, and the cases where they degenerate."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.compare.stats import (
    bootstrap_means,
    category_rows,
    compare_paired,
    direction,
    holm,
    mean_interval,
    summarise,
)

# Three prompts, two seeds. Differences: [0.2, 0], [-0.1, -0.3], [0.4, 0.4].
OTHER = np.array([[0.1, 0.5], [0.6, 0.8], [0.2, 0.3]])
SYSTEM = np.array([[0.3, 0.5], [0.5, 0.5], [0.6, 0.7]])


def test_paired_numbers_by_hand() -> None:
    paired = compare_paired(SYSTEM, OTHER)
    assert (paired.wins, paired.losses, paired.ties) == (3, 2, 1)
    # Inside the prompts 0.75, 0 and 1: a tie is one half, seeds are averaged before prompts.
    assert paired.win_rate == pytest.approx(1.75 / 3)
    assert paired.delta == pytest.approx((0.1 - 0.2 + 0.4) / 3)


def test_the_two_directions_complement_each_other() -> None:
    forth, back = compare_paired(SYSTEM, OTHER), compare_paired(OTHER, SYSTEM)
    assert forth.win_rate + back.win_rate == pytest.approx(1)
    assert forth.delta == -back.delta
    assert forth.delta_ci95[0] == pytest.approx(-back.delta_ci95[1])


def test_lower_is_better_turns_wins_but_not_the_difference() -> None:
    paired = compare_paired(SYSTEM, OTHER, higher_is_better=False)
    assert (paired.wins, paired.losses, paired.ties) == (2, 3, 1)
    assert paired.win_rate == pytest.approx(1.25 / 3)
    assert paired.delta == pytest.approx(0.1)


def test_every_prompt_weighs_the_same_in_the_mean() -> None:
    summary = summarise(SYSTEM, {"a": [0, 2], "b": [1]})
    assert summary.mean == pytest.approx((0.4 + 0.5 + 0.65) / 3)
    assert summary.by_category == {"a": pytest.approx(0.525), "b": pytest.approx(0.5)}
    assert category_rows(["a", "b", "a"]) == {"a": [0, 2], "b": [1]}


def test_the_bootstrap_resamples_prompts_and_not_images() -> None:
    # All seeds of a prompt agree, so that ten seeds are worth no more than one.
    one = np.arange(20, dtype=float)[:, None]
    assert compare_paired(one, np.zeros_like(one)).delta_ci95 == pytest.approx(
        compare_paired(np.repeat(one, 10, axis=1), np.zeros((20, 10))).delta_ci95
    )


def test_bootstrap_spread_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 200)
    draws = bootstrap_means(values[:, None])[:, 0]
    assert draws.shape == (10_000,)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws.std() == pytest.approx(values.std() / np.sqrt(200), rel=0.03)


def test_columns_share_their_draws_and_a_repeat_repeats() -> None:
    values = np.random.default_rng(1).normal(size=(30, 1))
    both = bootstrap_means(np.hstack([values, values + 1]), resamples=500)
    np.testing.assert_allclose(both[:, 0] + 1, both[:, 1])
    np.testing.assert_array_equal(both, bootstrap_means(np.hstack([values, values + 1]), resamples=500))
    assert not np.array_equal(both[:, 0], bootstrap_means(values, resamples=500, seed=1)[:, 0])


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    truth, covered, trials = 0.3, 0, 400
    for _ in range(trials):
        base = rng.normal(size=(50, 1))
        low, high = compare_paired(base + rng.normal(truth, 0.5, size=(50, 1)), base, resamples=1000).delta_ci95
        covered += low <= truth <= high
    # Binomial(400, 0.94) lies within these bounds but for about one time in a thousand.
    assert 0.90 <= covered / trials <= 0.98


def test_pairing_shrinks_the_interval() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(size=(100, 1))  # shared by both systems: the prompt is easy or hard for either
    a, b = difficulty + rng.normal(0, 0.1, (100, 1)), difficulty + rng.normal(0, 0.1, (100, 1))

    def width(interval: tuple[float, float]) -> float:
        return interval[1] - interval[0]

    paired = width(compare_paired(a, b).delta_ci95)
    unpaired = width(compare_paired(a, rng.permutation(b)).delta_ci95)
    assert paired < unpaired / 5


def test_all_ties() -> None:
    paired = compare_paired(SYSTEM, SYSTEM)
    assert (paired.wins, paired.losses, paired.ties, paired.win_rate) == (0, 0, 6, 0.5)
    assert (paired.ci95, paired.delta, paired.delta_ci95) == ((0.5, 0.5), 0.0, (0.0, 0.0))
    assert direction(paired) == 0


def test_rounding_is_a_tie_and_moves_no_interval() -> None:
    paired = compare_paired(SYSTEM + 3e-8, SYSTEM)
    assert paired.ties == 6
    assert paired.delta == 0.0 and direction(paired) == 0


def test_one_prompt_has_no_interval_and_decides_nothing() -> None:
    paired = compare_paired(np.array([[0.9, 0.8]]), np.array([[0.1, 0.2]]))
    assert (paired.win_rate, paired.delta) == (1.0, pytest.approx(0.7))
    assert paired.ci95 is None and paired.delta_ci95 is None
    assert direction(paired) == 0
    assert mean_interval(np.array([1.0])) is None


def test_direction_follows_the_sense_of_the_reward() -> None:
    paired = compare_paired(np.ones((9, 1)), np.zeros((9, 1)))
    assert direction(paired) == 1
    assert direction(paired, higher_is_better=False) == -1


def test_scores_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        compare_paired(SYSTEM, OTHER[:2])


def test_holm_on_textbook_examples() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 no smaller than the one before it; R: p.adjust(p, "holm").
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []


def test_holm_keeps_the_family_wise_error() -> None:
    """Of eight true hypotheses at least one is rejected in 5 % of families; without the correction in 34 %."""
    p_values = np.random.default_rng(0).uniform(size=(4000, 8))
    assert np.mean([min(holm(list(row))) <= 0.05 for row in p_values]) == pytest.approx(0.05, abs=0.01)
    assert np.mean(p_values.min(axis=1) <= 0.05) == pytest.approx(1 - 0.95**8, abs=0.03)
