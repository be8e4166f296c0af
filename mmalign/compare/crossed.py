"""Intervals over training seeds and prompts: two crossed random effects.

All trainings of a system meet the same prompts, so a value is `mean + prompt + training seed + rest`, and the mean
over S seeds and P prompts has the variance `seed / S + prompt / P + rest / (S P)`. The mean squares of the two-way
layout estimate its parts (Searle, Casella and McCulloch 1992, chapter 4):

    of seeds    MS_seed / (S P)                         estimates  seed / S + rest / (S P)
    of prompts  max(MS_prompt - MS_rest, 0) / (S P)     estimates  prompt / P

Two to five seeds tell little about their variance. The interval therefore takes each part's own t quantile, S - 1 and
P - 1 degrees of freedom, and weighs the quantiles by the parts (Cochran and Cox 1950, for two unequal variances):

    mean +- (t[S - 1] of_seeds + t[P - 1] of_prompts) / sqrt(of_seeds + of_prompts)

`tests/compare/test_compare_coverage.py` measures how often it holds the truth: docs/guides/statistics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import t as student

_LEAST_P = 1e-15


@dataclass(frozen=True)
class CrossedMean:
    """A mean over training seeds and prompts, with the two parts of its variance and the number of each.

    ```python
    estimate = crossed_mean(np.array([[0.1, 0.2], [0.0, 0.4], [0.2, 0.3]]))   # three prompts, two seeds
    estimate.mean, estimate.interval(0.95), estimate.p_value()
    ```
    """

    mean: float
    of_seeds: float
    of_prompts: float
    seeds: int
    prompts: int

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(self.of_seeds + self.of_prompts)

    def half_width(self, level: float = 0.95) -> float:
        """Return half the width of the interval."""
        return self._quantile(1 - level) * self.error

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return (low, high), symmetric about the mean."""
        half = self.half_width(level)
        return self.mean - half, self.mean + half

    def p_value(self, null: float = 0.0) -> float:
        """Return the two-sided p-value: one minus the level of the interval that ends at `null`."""
        distance = abs(self.mean - null)
        if self.error == 0:
            return float(distance == 0)
        if self._quantile(_LEAST_P) * self.error <= distance:
            return _LEAST_P
        log_p = brentq(lambda log_p: self._quantile(math.exp(log_p)) * self.error - distance, math.log(_LEAST_P), 0.0)
        return math.exp(log_p)

    def _quantile(self, outside: float) -> float:
        """Return the weighted t quantile that leaves the share `outside` beyond both ends."""
        if self.error == 0:
            return 0.0
        by_seeds, by_prompts = (student.isf(outside / 2, count - 1) for count in (self.seeds, self.prompts))
        return float((by_seeds * self.of_seeds + by_prompts * self.of_prompts) / self.error**2)


def crossed_mean(values: Float[np.ndarray, "prompts seeds"]) -> CrossedMean:
    """Return the mean of one value per prompt and training seed, at least two of each, with its variance's parts."""
    prompts, seeds = values.shape
    mean, by_prompt, by_seed = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = ((values - by_prompt[:, None] - by_seed + mean) ** 2).sum() / ((prompts - 1) * (seeds - 1))
    of_seeds = by_seed.var(ddof=1) / seeds
    of_prompts = max(by_prompt.var(ddof=1) / prompts - rest / (seeds * prompts), 0.0)
    return CrossedMean(float(mean), float(of_seeds), float(of_prompts), seeds, prompts)


def unit_values(values: Float[np.ndarray, "rows seeds"], groups: list[list[int]]) -> Float[np.ndarray, "groups seeds"]:
    """Return one value per group of rows whose plain mean is that over all rows, seed by seed.

    Groups differ in size, so the mean over rows is a ratio: total over number. The values are those of the ratio
    linearised at its mean (Cochran 1977, section 6.4).
    """
    centre = values.mean()
    scale = len(groups) / len(values)
    return np.stack([(values[rows] - centre).sum(axis=0) for rows in groups]) * scale + centre
