"""Modes that combine the parts into one score: pure functions on `[parts, batch]`, by the name of the mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-8
"""What lambda-Harmonic's published code adds to each score."""
WEIGHTED = ("weighted-sum", "harmonic", "geometric")
POSITIVE = ("harmonic", "geometric", "product")

Scores = Float[Tensor, "parts batch"]
Combined = tuple[Float[Tensor, " batch"], Float[Tensor, "parts batch"]]


def weighted_sum(values: Scores, weights: Float[Tensor, " parts"]) -> Combined:
    """Sum of `w r`; contributions `w r`."""
    shares = weights[:, None] * values
    return shares.sum(0), shares


def harmonic(values: Scores, weights: Float[Tensor, " parts"]) -> Combined:
    """Weighted harmonic mean `1 / sum of w / (r + 1e-8)` of positive scores; contributions `w / (r + 1e-8)`."""
    shares = weights[:, None] / (values + EPS)
    return 1 / shares.sum(0), shares


def geometric(values: Scores, weights: Float[Tensor, " parts"]) -> Combined:
    """Weighted geometric mean of positive scores; contributions `w log r`."""
    shares = weights[:, None] * values.log()
    return shares.sum(0).exp(), shares


def product(values: Scores) -> Combined:
    """Product of scores of at least 0; contributions `log r`."""
    return values.prod(0), values.log()


def smallest(values: Scores) -> Combined:
    """Minimum over the parts; the contribution of the (first) smallest is itself, that of the others 0."""
    score = values.amin(0)
    first = values.argmin(0, keepdim=True)
    return score, torch.zeros_like(values).scatter(0, first, score[None])


def uncertainty_weighted(values: Scores, lam: float, std: bool) -> Combined:
    """Return `mean - lam * var` over the population of parts, or `mean - lam * std`; contributions add up to it."""
    mean = values.mean(0)
    squares = (values - mean).square()
    variance = squares.mean(0)
    if std:
        # The deviation has no gradient where all parts agree; both are set to 0 there.
        agree = variance == 0
        squares = squares / torch.where(agree, torch.ones_like(variance), variance).sqrt()
    shares = (values - lam * squares) / len(values)
    return shares.sum(0), shares


Mode = Callable[[Tensor, Tensor, float, bool], Combined]
MODES: dict[str, Mode] = {
    "weighted-sum": lambda values, weights, lam, std: weighted_sum(values, weights),
    "mean": lambda values, weights, lam, std: weighted_sum(values, weights / len(weights)),
    "harmonic": lambda values, weights, lam, std: harmonic(values, weights),
    "geometric": lambda values, weights, lam, std: geometric(values, weights),
    "product": lambda values, weights, lam, std: product(values),
    "min": lambda values, weights, lam, std: smallest(values),
    "worst-case": lambda values, weights, lam, std: smallest(values),
    "uncertainty-weighted": lambda values, weights, lam, std: uncertainty_weighted(values, lam, std),
}


def bounds(
    mode: str, ranges: Sequence[tuple[float, float]], weights: Sequence[float], lam: float, std: bool
) -> tuple[float, float]:
    """Return bounds of the score from those of the parts; infinite where there are none."""
    if mode == "uncertainty-weighted":
        low, high = (sum(ends) / len(ranges) for ends in zip(*ranges, strict=True))
        half = (max(high for _, high in ranges) - min(low for low, _ in ranges)) / 2
        most = half if std else half**2
        return low - (lam * most if lam > 0 else 0.0), high - (lam * most if lam < 0 else 0.0)
    ends = [(low, high) if weight >= 0 else (high, low) for (low, high), weight in zip(ranges, weights, strict=True)]
    if mode in POSITIVE:
        ends = [(max(low, 0.0), max(high, 0.0)) for low, high in ends]
    # A weight of 0 removes a part, even one without bounds.
    kept = [(pair, weight) for pair, weight in zip(ends, weights, strict=True) if weight != 0]
    if not kept:
        return 0.0, 0.0
    values = torch.tensor([pair for pair, _ in kept], dtype=torch.float64)
    found = MODES[mode](values, values.new_tensor([weight for _, weight in kept]), lam, std)[0]
    return found[0].item(), found[1].item()
