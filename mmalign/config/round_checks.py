"""Find what is wrong with a configuration that trains in rounds, or names a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmalign.config.issues import ConfigIssue, mapping

SOURCES = ("pairs", "labels", "prompts")


def check_rounds(values: dict[str, Any], method: Any) -> Iterator[ConfigIssue]:
    """Find what the section `rounds` cannot do with this method and model; `method` is None where it is not known."""
    rounds, name = mapping(values, "rounds"), values["method"]["name"] if method else ""
    for source in (one for one in SOURCES if mapping(values, "data").get(one) is not None):
        yield ConfigIssue(("data", source), "rounds sample the training data themselves; set it to null")
    for key in (one for one in ("axis", "columns", "streaming") if mapping(values, "data").get(one)):
        yield ConfigIssue(("data", key), "is for pairs of your own, and rounds make theirs; remove it")
    if mapping(values, "adapter").get("start") is not None:
        fix = "would be added again to the model of each of the rounds; merge it first (`mmalign merge`)"
        yield ConfigIssue(("adapter", "start"), f"{fix} and start from that as `model`")
    if values.get("reference") is not None:
        yield ConfigIssue(("reference",), "rounds have references of their own; remove it (see rounds.reference)")
    if rounds.get("frames") is not None and values.get("video") is None:
        fix = "is for image rewards on video models (section video); remove it"
        yield ConfigIssue(("rounds", "frames"), fix)
    if method and method.needs.modality == "vlm":
        message = f"method '{name}' trains a vision-language model, and rounds sample images; remove it"
        yield ConfigIssue(("rounds",), message)
    elif method and method.needs.source == "prompts":
        yield ConfigIssue(("rounds",), f"method '{name}' draws its own samples while training; remove rounds")
    elif method:
        yield from _check_reference(rounds, method, name)
        yield from _check_real(values, method, name)


def _check_reference(rounds: dict[str, Any], method: Any, name: str) -> Iterator[ConfigIssue]:
    if rounds.get("reference") == "base" and not method.needs.reference:
        yield ConfigIssue(("rounds", "reference"), f"method '{name}' has no reference; remove it")


def _check_real(values: dict[str, Any], method: Any, name: str) -> Iterator[ConfigIssue]:
    needed, path = method.needs.source, ("rounds", "real")
    if not mapping(values, "rounds").get("real") or needed == "images":
        return
    if needed != "pairs" or "sft_weight" not in method.Config.model_fields:
        yield ConfigIssue(path, f"method '{name}' learns from {needed}, not from good images; remove it")
    elif not mapping(values, "method").get("sft_weight"):
        fix = "are learned by their denoising error alone; give method.sft_weight, its weight, such as 0.1"
        yield ConfigIssue(path, f"real samples of method '{name}' {fix}")
    elif mapping(values, "data").get("rarity") is not None:
        yield ConfigIssue(("data", "rarity"), "weighs pairs by their scores, and real samples have none; remove it")
