"""Paired statistics over prompts: means, win rates and differences with bootstrap intervals.

Two systems generate images of the same prompts from the same seeds, so their scores are compared pair by pair: one
comparison for
each (prompt, seed). The seeds of one prompt are not independent, therefore everything is averaged inside the prompt
first and only prompts are resampled (percentile bootstrap; Efron and Tibshirani 1993, chapter 13, with the prompt as
the sampling unit). An interval describes new prompts of the same kind, not new images of the same prompts.

The unit of resampling may also be a group of rows, such as the questions about conflicting videos, which are right or
wrong
together: `units` names the group of each row. Every row weighs the same, so the mean of a resample is a ratio, of the
sum over the rows drawn to their number.

Shapes: scores are `[prompts, seeds]`, of a system trained from several seeds `[prompts, replicas * seeds]`, replica by
replica: then training seeds too are averaged inside the prompt. Win rates lie in [0, 1]; a tie counts as one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
TIE_TOLERANCE = 1e-6
"""Scores closer than this (absolute, or relative for large ones) tie: float32 rounding must not decide a win."""

Ci = tuple[float, float] | None
"""A 95 % interval (low, high); None for a single prompt, which cannot be resampled."""


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
    its sign for rewards where lower is better, while a win always means "the better score".
    """

    win_rate: float
    ci95: Ci
    wins: int
    losses: int
    ties: int
    delta: float
    delta_ci95: Ci


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
    if units is None:
        totals = values[:, None]
    else:
        totals = np.array([(values[rows].sum(), len(rows)) for rows in category_rows(units).values()], np.float64)
    if len(totals) < 2:
        return None
    means = bootstrap_means(totals, resamples=resamples, seed=seed)
    draws = means[:, 0] if units is None else means[:, 0] / means[:, 1]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(
    scores: Float[np.ndarray, "prompts seeds"],
    categories: Sequence[str] | None = None,
    *,
    units: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
) -> Summary:
    """Summarise one system under one reward; every prompt weighs the same, whatever its category's size."""
    per_prompt = scores.mean(axis=1)
    groups = category_rows(categories or [])
    return Summary(
        mean=float(per_prompt.mean()),
        ci95=mean_interval(per_prompt, units=units, resamples=resamples),
        by_category={name: float(per_prompt[rows].mean()) for name, rows in groups.items()},
    )


def compare_paired(
    scores: Float[np.ndarray, "prompts seeds"],
    other: Float[np.ndarray, "prompts seeds"],
    *,
    higher_is_better: bool = True,
    units: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
) -> Paired:
    """Compare a system with another on the same prompts and seeds.

    Raises:
        ValueError: the two were not scored on the same prompts and seeds.
    """
    difference, tied = _differences(scores, other)
    won = ~tied & ((difference > 0) == higher_is_better)
    per_prompt_wins = (won + 0.5 * tied).mean(axis=1)
    per_prompt_delta = difference.mean(axis=1)
    return Paired(
        win_rate=float(per_prompt_wins.mean()),
        ci95=mean_interval(per_prompt_wins, units=units, resamples=resamples),
        wins=int(won.sum()),
        losses=int((~won & ~tied).sum()),
        ties=int(tied.sum()),
        delta=float(per_prompt_delta.mean()),
        delta_ci95=mean_interval(per_prompt_delta, units=units, resamples=resamples),
    )


def spread_of_deltas(
    scores: Float[np.ndarray, "prompts columns"], other: Float[np.ndarray, "prompts columns"], replicas: int
) -> float:
    """Return the standard deviation (n - 1) over the replicas of the mean difference, at least two of them."""
    difference, _ = _differences(scores, other)
    return float(difference.reshape(len(scores), replicas, -1).mean(axis=(0, 2)).std(ddof=1))


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
