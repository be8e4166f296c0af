"""How often the intervals hold the truth, by simulation: the error of a training seed is part of them.

A true difference of zero, 200 prompts x 2 seeds. Per prompt and training the difference has the spread of
`docs/results/two-rounds.md` (correctness: 0.10 of prompts, 0.08 of prompts within a training). The training seed
shifts all of a training's images. Prompts are not normal but Laplace: most hardly differ, a few differ much.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from mmalign.compare.stats import compare_paired

PROMPTS, IMAGES = 200, 2
PROMPT_SD, WITHIN_SD = 0.10, 0.08


def coverage(
    training_seeds: int, seed_sd: float, trials: int, *, as_one: bool = False, rng_seed: int = 0
) -> tuple[float, float]:
    """Return the shares of intervals that hold the true difference, 0, and the true win rate, 0.5.

    `as_one` leaves out the training seed, as if every column were another image of one training.
    """
    rng = np.random.default_rng([rng_seed, training_seeds, int(1000 * seed_sd)])
    held = np.zeros(2)
    for _ in range(trials):
        columns = training_seeds * IMAGES
        base = np.tile(rng.uniform(0.3, 0.9, (PROMPTS, IMAGES)), (1, training_seeds))
        gain = rng.laplace(0, PROMPT_SD / 2**0.5, (PROMPTS, 1))
        gain = gain + np.repeat(rng.normal(0, seed_sd, training_seeds), IMAGES)
        gain = gain + rng.normal(0, WITHIN_SD * IMAGES**0.5, (PROMPTS, columns))
        paired = compare_paired(base + gain, base, replicas=1 if as_one else training_seeds, resamples=200)
        assert paired.delta_ci95 and paired.ci95
        held += paired.delta_ci95[0] <= 0 <= paired.delta_ci95[1], paired.ci95[0] <= 0.5 <= paired.ci95[1]
    delta, win_rate = held / trials
    return float(delta), float(win_rate)


@pytest.mark.parametrize("seed_sd", [0.0, 0.016, 0.040])
def test_three_training_seeds_hold_the_truth(seed_sd: float) -> None:
    # With 300 trials a true 93 % lies above 0.89 but for about one time in a hundred, a true 97.5 % below 0.99.
    for share in coverage(3, seed_sd, 300):
        assert 0.89 <= share <= 0.99


def test_prompts_alone_do_not() -> None:
    """The fault: training seeds averaged within a prompt, and prompts resampled."""
    delta, win_rate = coverage(3, 0.040, 200, as_one=True)
    assert delta < 0.65 and win_rate < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("training_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.016, 0.040])
def test_coverage_is_near_95_percent(training_seeds: int, seed_sd: float) -> None:
    # Standard error of 2,000 trials: 0.006 at 93 %, 0.0035 at 97.5 %. Two seeds lean to the safe side.
    shares = coverage(training_seeds, seed_sd, 2000, rng_seed=1)
    before = coverage(training_seeds, seed_sd, 2000, as_one=True, rng_seed=1)
    for name, (delta, win_rate) in (("seeds and prompts", shares), ("prompts alone", before)):
        print(
            f"{training_seeds} training seeds, sd {seed_sd}, {name}: difference {delta:.3f}, win rate {win_rate:.3f}"
        )
    for share in shares:
        assert 0.925 <= share <= 0.985


def test_degrees_of_freedom_by_satterthwaite_would_be_too_narrow() -> None:
    """Why each part has its own t quantile: with a large variance of few seeds the approximation holds 87 to 92 %."""
    rng, trials, found = np.random.default_rng(0), 100_000, {}
    for seeds in (2, 3, 5):
        freedom = np.array([seeds - 1, PROMPTS - 1, (seeds - 1) * (PROMPTS - 1)])
        rest = WITHIN_SD**2
        expected = np.array([PROMPTS * 0.040**2 + rest, seeds * PROMPT_SD**2 + rest, rest]) / (seeds * PROMPTS)
        squares = expected * rng.chisquare(freedom, (trials, 3)) / freedom  # of seeds, prompts and the rest
        variance = squares[:, 0] + np.maximum(squares[:, 1] - squares[:, 2], 0)
        half = student.isf(0.025, variance**2 / (squares**2 / freedom).sum(axis=1)) * variance**0.5
        means = rng.normal(0, (expected[0] + expected[1] - expected[2]) ** 0.5, trials)
        found[seeds] = float(np.mean(abs(means) <= half))
    assert found == pytest.approx({2: 0.872, 3: 0.921, 5: 0.941}, abs=0.004)
