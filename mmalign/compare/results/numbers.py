"""Numbers as text: how many decimals, signs, differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def describe_delta(paired: dict[str, Any], digits: int) -> str:
    """Write a difference with its interval: "+0.043 [+0.021, +0.064]"."""
    if paired["delta_ci95"] is None:
        return f"{signed(paired['delta'], digits)}, no interval from one prompt"
    low, high = paired["delta_ci95"]
    return f"{signed(paired['delta'], digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def reward_digits(systems: dict[str, Any], label: str) -> int:
    """Return the number of decimals of a reward's numbers everywhere, as its intervals justify."""
    rewards = [system["rewards"][label] for system in systems.values()]
    means = [decimals(reward["mean"], reward["ci95"]) for reward in rewards]
    deltas = [system["versus_baseline"][label] for system in systems.values() if "versus_baseline" in system]
    wanted = [decimals(paired["delta"], paired["delta_ci95"]) for paired in deltas if paired["delta"]]
    return max(means[0], min([*wanted, means[0] + 1]))


def decimals(value: float, interval: Sequence[float] | None = None) -> int:
    """Return the number of decimals that shows two digits of a value's uncertainty, or three of a bare value."""
    width = (interval[1] - interval[0]) if interval else 0.0
    scale = width if width > 0 else abs(value) / 10
    if scale <= 0:
        return 3
    return int(min(6, max(0, 1 - np.floor(np.log10(scale)))))


def describe_p(paired: dict[str, Any]) -> str:
    """Write the corrected p-value of a claim: "0.012"; nothing where the difference is no claim."""
    if "p_holm" not in paired:
        return ""
    return f"{paired['p_holm']:.3f}" if paired["p_holm"] >= 0.0005 else "<0.001"


def counted_direction(paired: dict[str, Any]) -> int:
    """Return the direction of a difference that survives the correction, 0 of any other."""
    return int(paired["direction"]) if paired.get("survives_holm") else 0


def signed(value: float, digits: int) -> str:
    """Write a number with its sign, a true minus, and no sign on zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text
