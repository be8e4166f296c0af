"""VideoDPO's weights of pairs: what is rare among the scores counts more.

Source: Liu et al., "VideoDPO: Omni-Preference Alignment for Video Diffusion Generation" (arXiv 2412.14167). Its code
has another rule, which is switched off there: a power of 0.72 divided by the product of both scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

BINS = 100
"""Bins over the span of the scores; the paper's are 0.01 wide, of scores between 0 and 1."""


def rarity_weights(first: Sequence[float], second: Sequence[float], exponent: float) -> list[float]:
    """Return (p_max / sqrt(p(first) p(second))) ** exponent for each pair of scores, at least 1.

    p is the share of all scores in a score's bin, p_max that of the fullest bin. Exponent 0 weighs all alike.

    >>> rarity_weights([1.0, 1.0, 1.0], [0.0, 0.0, 1.0], 1.0)
    [1.4142135623730951, 1.4142135623730951, 1.0]
    """
    scores = [*first, *second]
    low, span = min(scores), max(scores) - min(scores)

    def place(score: float) -> int:
        return min(int((score - low) / span * BINS), BINS - 1) if span else 0

    counts = Counter(map(place, scores))
    most = max(counts.values())
    return [
        float((most**2 / (counts[place(one)] * counts[place(other)])) ** (exponent / 2))
        for one, other in zip(first, second, strict=True)
    ]
