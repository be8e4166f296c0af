"""Whether a reward orders labelled pairs as their labels do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmalign.scoring.choice import TIE_TOLERANCE, WeightedReward, weighted_total
from mmalign.scoring.engine import score_items
from mmalign.scoring.pictures import Pair, pictures_of_pairs


@dataclass(frozen=True)
class Share:
    """The share of `pairs` pairs that a reward orders as they are labelled, ties one half, in 0..1."""

    value: float
    pairs: int

    @property
    def standard_error(self) -> float:
        """The standard error of the share, as of a coin."""
        return math.sqrt(self.value * (1 - self.value) / self.pairs) if self.pairs else math.nan


def pair_outcome(chosen: float, rejected: float) -> float:
    """Return 1 where the chosen image scores higher, 0 where lower, 1/2 for a tie, NaN without both scores."""
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        return math.nan
    if np.isclose(chosen, rejected, rtol=TIE_TOLERANCE, atol=TIE_TOLERANCE):
        return 0.5
    return float(chosen > rejected)


def share_in_order(
    pairs: Iterable[Pair],
    rewards: Sequence[WeightedReward],
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Share:
    """Return the share of pairs whose chosen side has the higher weighted sum; pairs without scores are left out.

    `progress` is called with the number of images or videos newly scored.
    """
    items = (picture.item() for picture in pictures_of_pairs(pairs))
    stream = score_items(items, rewards, batch_size=batch_size, modality=rewards[0].reward.modality)
    outcomes = []
    for chosen, rejected in zip(stream, stream, strict=True):
        whole = not (chosen.error or rejected.error)
        totals = [weighted_total(one.scores, rewards) for one in (chosen, rejected)] if whole else [math.nan, math.nan]
        outcomes.append(pair_outcome(*totals))
        if progress is not None:
            progress(2)
    known = [outcome for outcome in outcomes if not math.isnan(outcome)]
    return Share(sum(known) / len(known) if known else math.nan, len(known))
