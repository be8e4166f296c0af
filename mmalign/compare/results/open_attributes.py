"""The entropy of what prompts leave open, for results.json: each system's, and how much of the baseline's is left."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from mmalign.compare.entropy import entropy_values, ratio_values
from mmalign.compare.images.open_attributes import OpenCounts
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.training_seeds import tile_pair
from mmalign.compare.stats import interval_over_seeds


def entropy_results(comparison: Comparison) -> dict[str, Any]:
    """Return attribute -> its numbers.

    Each has `most`, the bits of equal shares, and `systems`: system -> `bits`, `ci95`, the `favourite` value with its
    `favourite_share` and the `count` of values read; and `versus_baseline`: `delta`, `delta_ci95`, `share` and
    `share_ci95`, the share of the baseline's bits (None where those are 0).
    """
    found: dict[str, Any] = {}
    for attribute, open_counts in comparison.open_counts.items():
        values = {name: _by_replica(counts) for name, counts in open_counts.counts.items()}
        most = math.log2(len(open_counts.kinds))
        found[attribute] = {"most": most, "systems": _systems(comparison, values, most)}
        for name, one in found[attribute]["systems"].items():
            one |= _favourite(open_counts, name)
    return found


def _by_replica(counts: Float[np.ndarray, "prompts replicas kinds"]) -> Float[np.ndarray, "prompts replicas"]:
    return np.stack([entropy_values(counts[:, replica]) for replica in range(counts.shape[1])], axis=1)


def _systems(comparison: Comparison, values: dict[str, np.ndarray], most: float) -> dict[str, Any]:
    base, resamples = values[comparison.baseline], comparison.resamples
    systems: dict[str, Any] = {}
    for name, own in values.items():
        interval = interval_over_seeds(own, resamples=resamples)
        systems[name] = {
            "bits": float(own.mean()),
            "ci95": interval and (max(interval[0], 0.0), min(interval[1], most)),
        }
        if name != comparison.baseline:
            systems[name]["versus_baseline"] = _versus(*tile_pair(own, base), resamples)
    return systems


def _versus(own: np.ndarray, base: np.ndarray, resamples: int) -> dict[str, Any]:
    shares = ratio_values(own, base) if (base.mean(axis=0) > 0).all() else None
    return {
        "delta": float((own - base).mean()),
        "delta_ci95": interval_over_seeds(own - base, resamples=resamples),
        "share": None if shares is None else float(shares.mean()),
        "share_ci95": None if shares is None else interval_over_seeds(shares, resamples=resamples),
    }


def _favourite(open_counts: OpenCounts, name: str) -> dict[str, Any]:
    pooled = open_counts.counts[name].sum(axis=(0, 1))
    first = int(pooled.argmax())
    return {
        "favourite": open_counts.kinds[first],
        "favourite_share": float(pooled[first] / pooled.sum()),
        "count": int(pooled.sum()),
    }
