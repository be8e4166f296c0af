"""CaPO's calibrated rewards and the choice of pairs by Pareto frontiers (arXiv 2502.02588)."""

from __future__ import annotations

import math
from collections.abc import Sequence

Merits = Sequence[Sequence[float]]
"""For each image of one prompt, a number for each reward; more is better."""


def win_rates(scores: Merits, temperature: float = 1.0) -> list[list[float]]:
    """Return the expected win rate of each image against the others of its prompt, for each reward, in 0..1.

    mean over j != i of sigmoid((score_i - score_j) / temperature), by Bradley and Terry. The mean over the images of
    one prompt is 1/2, and rewards of any range become comparable. At least two images are needed.
    """
    columns = [list(column) for column in zip(*scores, strict=True)]
    return [
        [
            math.fsum(_sigmoid((own - other) / temperature) for j, other in enumerate(column) if j != i)
            / (len(column) - 1)
            for column, own in zip(columns, row, strict=True)
        ]
        for i, row in enumerate(scores)
    ]


def frontier_pairs(merits: Merits) -> list[tuple[int, int]]:
    """Return the index pairs (upper, lower) of the best and worst frontiers.

    The upper frontier holds the images that no other one beats in every reward, the lower one those that beat no other
    in every reward; an image in both is in neither. ("Beats": at least as good everywhere and better somewhere.)
    """
    indices = range(len(merits))
    upper = {i for i in indices if not any(_dominates(merits[j], merits[i]) for j in indices)}
    lower = {i for i in indices if not any(_dominates(merits[i], merits[j]) for j in indices)}
    return [(i, j) for i in sorted(upper - lower) for j in sorted(lower - upper)]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(x / 2))
