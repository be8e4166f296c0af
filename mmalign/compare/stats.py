"""Paired statistics over prompts: means, win rates and differences with bootstrap intervals.

Two systems generate images of the same prompts from the same seeds, so their scores are compared pair by pair: one
comparison for
each (prompt, seed). The seeds of one prompt are not independent, therefore everything is averaged inside the prompt
first and only prompts are resampled (percentile bootstrap; Efron and Tibshirani 1993, chapter 13, with the prompt as
the sampling unit). An interval describes new prompts of the same kind, not new images of the same prompts, and not
new trainings: it is that of one model.

A system trained from several seeds has an interval for new trainings and new prompts: `mmalign.compare.crossed`.

The unit of resampling may also be a group of rows, such as the questions about conflicting videos, which are right or
wrong
together: `units` names the group of each row. Every row weighs the same, so the mean of a resample is a ratio, of the
sum over the rows drawn to their number.

Shapes: scores are `[prompts, seeds]`, of a system trained from several seeds `[prompts, replicas * seeds]`, replica by
replica. Win rates lie in [0, 1]; a tie counts as one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from mmalign.compare.crossed import CrossedMean, crossed_mean, unit_values
from mmalign.scoring.choice import TIE_TOLERANCE

RESAMPLES = 10_000

Ci = tuple[float, float] | None
"""A 95 % interval (low, high); None for a single prompt, which cannot be resampled."""

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Summary:
    """One system under one reward: the mean over prompts, its interval and the mean of each category."""

    mean: float
    ci95: Ci
    by_category: dict[str, float]


@dataclass(frozen=True)
class Paired:
    """One system against another under one reward.

    `wins + losses + ties` is the number of (prompt, seed) pairs; `delta` is the mean of system minus other, and keeps
    its sign for rewards where lower is better, while a win always means "the better score". `p` is the two-sided
    p-value of no difference, None without an interval; bootstrapped ones are at least 2 / (resamples + 1).
    """

    win_rate: float
    ci95: Ci
    wins: int
    losses: int
    ties: int
    delta: float
    delta_ci95: Ci
    p: float | None


def bootstrap_means(
    values: Float[np.ndarray, "prompts quantities"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "resamples quantities"]:
    """Return the mean of each column over `resamples` draws of the prompts with replacement.

    All columns share the draws, as they must when they are compared with one another. The draws depend on `seed` and
    the number of prompts alone, so a repeated call repeats its numbers.
    """
    prompts = len(values)
    counts = _resample_counts(prompts, resamples, seed)
    chunk = max(1, 4_000_000 // prompts)  # the counts are kept in 16 bit; as floats at most 32 MB at a time
    parts = [counts[start : start + chunk].astype(np.float64) @ values for start in range(0, resamples, chunk)]
    return np.concatenate(parts) / prompts


def mean_interval(
    values: Float[np.ndarray, " prompts"],
    *,
    units: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Ci:
    """Return the percentile bootstrap interval of the mean of one value per prompt; None for a single unit."""
    draws = _resampled_means(values, units, resamples, seed)
    if draws is None:
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(
    values: np.ndarray, units: Sequence[str] | None, resamples: int, seed: int = 0
) -> np.ndarray | None:
    """Return the mean of every resample of the units; None for a single one."""
    if units is None:
        totals = values[:, None]
    else:
        totals = np.array([(values[rows].sum(), len(rows)) for rows in category_rows(units).values()], np.float64)
    if len(totals) < 2:
        return None
    means = bootstrap_means(totals, resamples=resamples, seed=seed)
    return means[:, 0] if units is None else means[:, 0] / means[:, 1]


def interval_over_seeds(
    values: Float[np.ndarray, "prompts replicas"], *, units: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> Ci:
    """Return the 95 % interval of the mean: bootstrapped over prompts for one training, over both for several."""
    if values.shape[1] == 1:
        return mean_interval(values[:, 0], units=units, resamples=resamples)
    crossed = _crossed(values, units)
    return crossed.interval() if crossed else None


def p_value(
    values: Float[np.ndarray, "prompts replicas"], *, units: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> float | None:
    """Return the two-sided p-value of a mean of zero, by the method of `interval_over_seeds`; None without one.

    That of the bootstrap is twice the smaller share of resamples on either side of zero, the sample itself counted as
    one of them (Davison and Hinkley 1997, section 4.4).
    """
    if values.shape[1] > 1:
        crossed = _crossed(values, units)
        return crossed.p_value() if crossed else None
    draws = _resampled_means(values[:, 0], units, resamples)
    if draws is None:
        return None
    least = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (least + 1) / (len(draws) + 1)))


def _crossed(values: np.ndarray, units: Sequence[str] | None) -> CrossedMean | None:
    by_unit = values if units is None else unit_values(values, [*category_rows(units).values()])
    return crossed_mean(by_unit) if len(by_unit) > 1 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (Holm 1979): those of at most 0.05 hold together at a family-wise error of 5 %.

    ```python
    holm([0.01, 0.04, 0.03])   # 0.03, 0.06, 0.06
    ```
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def summarise(
    scores: Float[np.ndarray, "prompts columns"],
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    replicas: int = 1,
    units: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
) -> Summary:
    """Summarise one system under one reward; every prompt weighs the same, whatever its category's size.

    `groups`: the rows of each category. `columns` are `replicas * seeds`, those of the first training seed first.
    """
    values = _by_replica(scores, replicas)
    per_prompt = values.mean(axis=1)
    return Summary(
        mean=float(per_prompt.mean()),
        ci95=interval_over_seeds(values, units=units, resamples=resamples),
        by_category={name: float(per_prompt[list(rows)].mean()) for name, rows in (groups or {}).items()},
    )


def compare_paired(
    scores: Float[np.ndarray, "prompts columns"],
    other: Float[np.ndarray, "prompts columns"],
    *,
    higher_is_better: bool = True,
    replicas: int = 1,
    units: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
) -> Paired:
    """Compare a system with another on the same prompts and seeds.

    `columns` are `replicas * seeds`, those of the first training seed first.

    Raises:
        ValueError: the two were not scored on the same prompts and seeds.
    """
    difference, tied = _differences(scores, other)
    won = ~tied & ((difference > 0) == higher_is_better)
    wins, deltas = _by_replica(won + 0.5 * tied, replicas), _by_replica(difference, replicas)
    win_ci = interval_over_seeds(wins, units=units, resamples=resamples)
    return Paired(
        win_rate=float(wins.mean(axis=1).mean()),
        ci95=win_ci and (max(win_ci[0], 0.0), min(win_ci[1], 1.0)),
        wins=int(won.sum()),
        losses=int((~won & ~tied).sum()),
        ties=int(tied.sum()),
        delta=float(deltas.mean(axis=1).mean()),
        delta_ci95=interval_over_seeds(deltas, units=units, resamples=resamples),
        p=p_value(deltas, units=units, resamples=resamples),
    )


def _by_replica(columns: np.ndarray, replicas: int) -> np.ndarray:
    """Average the images of a prompt, training by training: `[prompts, replicas]`."""
    return np.stack([part.mean(axis=1) for part in np.split(columns, replicas, axis=1)], axis=1)


def spread_of_deltas(
    scores: Float[np.ndarray, "prompts columns"], other: Float[np.ndarray, "prompts columns"], replicas: int
) -> float:
    """Return the standard deviation (n - 1) over the replicas of the mean difference, at least two of them."""
    difference, _ = _differences(scores, other)
    return float(_by_replica(difference, replicas).mean(axis=0).std(ddof=1))


def _differences(scores: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference of each pair, zero for a tie, and a mask of the ties."""
    if scores.shape != other.shape:
        raise ValueError(f"scores of shape {scores.shape} and {other.shape} are not paired")
    tied = np.isclose(scores, other, rtol=TIE_TOLERANCE, atol=TIE_TOLERANCE)
    return np.where(tied, 0.0, scores - other), tied  # otherwise rounding alone could move an interval off zero


def category_rows(categories: Sequence[str]) -> dict[str, list[int]]:
    """Return the row numbers of each category, in the order in which the categories first appear."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(categories):
        rows.setdefault(name, []).append(row)
    return rows


def direction(paired: Paired, *, higher_is_better: bool = True) -> int:
    """Return +1 if the interval of the difference lies on the better side of zero, -1 on the worse, 0 otherwise."""
    if paired.delta_ci95 is None:
        return 0
    low, high = paired.delta_ci95
    sign = (low > 0) - (high < 0)
    return sign if higher_is_better else -sign


@lru_cache(maxsize=16)
def _resample_counts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt occurs in each resample, `[resamples, prompts]`; shared by all quantities of a report."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return counts.astype(np.uint16)
