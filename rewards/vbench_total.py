"""The total of VBench: its sixteen dimensions rescaled by fixed bounds, and averaged with fixed weights.

Source: Huang et al. 2024, "VBench" (arXiv:2311.17982), supplement, and the authors' script for the final score. A
dimension that is not measured counts as 0 there; here it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from rewards.errors import RewardError, choices

# Minimum and maximum of each dimension in the authors' normalisation, quality first.
QUALITY = {
    "subject consistency": (0.1462, 1.0), "background consistency": (0.2615, 1.0),
    "temporal flickering": (0.6293, 1.0), "motion smoothness": (0.706, 0.9975), "dynamic degree": (0.0, 1.0),
    "aesthetic quality": (0.0, 1.0), "imaging quality": (0.0, 1.0),
}  # fmt: skip
SEMANTIC = {
    "object class": (0.0, 1.0), "multiple objects": (0.0, 1.0), "human action": (0.0, 1.0), "color": (0.0, 1.0),
    "spatial relationship": (0.0, 1.0), "scene": (0.0, 0.8222), "appearance style": (0.0009, 0.2855),
    "temporal style": (0.0, 0.364), "overall consistency": (0.0, 0.364),
}  # fmt: skip
BOUNDS = QUALITY | SEMANTIC
HALF = "dynamic degree"  # counts half
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


def vbench_total(scores: Mapping[str, float]) -> dict[str, float]:
    """Return VBench's `quality`, `semantic` and `total` from the raw means of all sixteen dimensions, in [0, 1] each.

    Raises:
        RewardError: a dimension is missing or unknown: the total is defined only over all sixteen.
    """
    for name in scores:
        if name not in BOUNDS:
            raise RewardError(f"VBench has no dimension {name!r}; {choices(name, BOUNDS)}")
    if lacking := [name for name in BOUNDS if name not in scores]:
        raise RewardError(f"the total of VBench is over all {len(BOUNDS)} dimensions; {', '.join(lacking)} is missing")

    def part(dimensions: Mapping[str, tuple[float, float]]) -> float:
        weights = {name: 0.5 if name == HALF else 1.0 for name in dimensions}
        rescaled = {name: (scores[name] - low) / (high - low) for name, (low, high) in dimensions.items()}
        return sum(weights[name] * rescaled[name] for name in dimensions) / sum(weights.values())

    quality, semantic = part(QUALITY), part(SEMANTIC)
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"quality": quality, "semantic": semantic, "total": total}
