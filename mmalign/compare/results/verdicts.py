"""Verdicts by held-out rewards alone, corrected for the number of comparisons.

Every claim "this system differs from the baseline on this held-out reward" of a report is one of a family, and so is
every such claim against the guidance control. Among many claims some intervals exclude zero by chance: a claim counts
if its p-value stays at most 0.05 after Holm's correction over its family. The interval itself is not corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.numbers import describe_delta
from mmalign.compare.stats import SIGNIFICANT, holm


def add_verdicts(comparison: Comparison, document: dict[str, Any]) -> None:
    """Add to the content of results.json the verdicts, and the claims' corrected p-values beside their intervals."""
    keys = ["versus_baseline", *(["versus_control"] if comparison.control else [])]
    document["comparisons"] = {key: _correct(comparison, document, key) for key in keys}
    document["verdicts"] = {
        name: {key: _verdict(comparison, document, name, key) for key in keys} for name in comparison.challengers
    }


def _correct(comparison: Comparison, document: dict[str, Any], key: str) -> int:
    """Add `p_holm` and `survives_holm` to every claim of the family that has a p-value, and return their number."""
    claims = [
        document["systems"][name][key][reward]
        for name in comparison.challengers
        for reward in _held_out(comparison, name)
    ]
    claims = [paired for paired in claims if paired["p"] is not None]
    for paired, adjusted in zip(claims, holm([paired["p"] for paired in claims]), strict=True):
        paired["p_holm"] = adjusted
        paired["survives_holm"] = adjusted <= SIGNIFICANT and paired["direction"] != 0
    return len(claims)


def _held_out(comparison: Comparison, name: str) -> list[str]:
    """Return the rewards that judge a system: neither neutral nor trained on."""
    return [
        reward
        for reward, facts in comparison.rewards.items()
        if not facts.neutral and not comparison.is_trained_on(name, reward)
    ]


def _verdict(comparison: Comparison, document: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    versus = document["systems"][name][key]
    other = comparison.control if key == "versus_control" else comparison.baseline
    held_out = _held_out(comparison, name)
    clear = [reward for reward in held_out if versus[reward]["direction"]]
    counted = [reward for reward in clear if versus[reward]["survives_holm"]]
    better = [reward for reward in counted if versus[reward]["direction"] > 0]
    worse = [reward for reward in counted if versus[reward]["direction"] < 0]
    uncorrected = [reward for reward in clear if reward not in counted]
    digits = {label: facts["digits"] for label, facts in document["rewards"].items()}
    texts = {label: f"{label} ({describe_delta(paired, digits[label])})" for label, paired in versus.items()}
    if not held_out:
        outcome = "none"
    elif better and worse:
        outcome = "mixed"
    else:
        outcome = "better" if better else "worse" if worse else "inconclusive"
    sentence = _sentence(name, other, outcome, held_out, better, worse, texts)
    return {
        "other": other,
        "outcome": outcome,
        "held_out": held_out,
        "better": better,
        "worse": worse,
        "uncorrected": uncorrected,
        "sentence": sentence + _fallen(uncorrected, texts, document["comparisons"][key]),
    }


def _fallen(uncorrected: Sequence[str], texts: dict[str, str], comparisons: int) -> str:
    """Say which intervals exclude zero only before the correction."""
    if not uncorrected:
        return ""
    subject = "interval on {} excludes" if len(uncorrected) == 1 else "intervals on {} exclude"
    text = subject.format(_listed(uncorrected, texts))
    return f" The {text} zero, but not after Holm's correction for {comparisons} comparisons."


def _sentence(
    name: str,
    other: str | None,
    outcome: str,
    held_out: Sequence[str],
    better: Sequence[str],
    worse: Sequence[str],
    texts: dict[str, str],
) -> str:
    """Return the verdict as one sentence with the numbers behind it."""
    if outcome == "none":
        return f"No verdict on {name} against {other}: it was trained on every reward reported here."
    if outcome == "inconclusive":
        return f"No clear difference between {name} and {other} on {_listed(held_out, texts)}."
    rest = len(held_out) - len(better) - len(worse)
    tail = {0: ".", 1: "; the other held-out reward shows no clear difference."}.get(
        rest, f"; the other {rest} held-out rewards show no clear difference."
    )
    if outcome == "mixed":
        return f"{name} is better than {other} on {_listed(better, texts)}, but worse on {_listed(worse, texts)}{tail}"
    return f"{name} is {outcome} than {other} on {_listed(better or worse, texts)}{tail}"


def _listed(rewards: Sequence[str], texts: dict[str, str]) -> str:
    parts = [texts[reward] for reward in rewards]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
