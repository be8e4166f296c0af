"""The guidance control: the untouched baseline at its best guidance, chosen on validation prompts.

A fine-tuned model often gains no more than another guidance scale would have gained without training. The control
shows this: the stated rewards choose its guidance on validation prompts, and it then generates the test prompts once,
like every system.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.compare.config import CompareConfig, GuidanceControl
from mmalign.compare.images.draw import ModelHolder, draw_system
from mmalign.compare.images.media import ImageMedia, check_entry
from mmalign.compare.images.scoring import score_all
from mmalign.compare.images.store import ImageStore
from mmalign.compare.scores import RewardFacts, Scores
from mmalign.compare.stats import summarise
from mmalign.compare.systems.facts import SystemFacts
from mmalign.core.progress import note
from mmalign.data.prompts import Prompt, load_prompts


def control_prompts(config: CompareConfig, media: ImageMedia) -> list[Prompt]:
    """Return the validation prompts of the guidance control; none without a control.

    Raises:
        UserError, RewardError: the prompts cannot be read, or the rewards that choose cannot score images of them.
    """
    control = config.guidance_control
    if control is None:
        return []
    prompts = load_prompts(control.prompts, control.limit)
    for entry in config.rewards:
        if entry.title in control.rewards:
            check_entry(entry, [prompt.text for prompt in prompts], media)
    return prompts


def run_control(
    config: CompareConfig,
    control: GuidanceControl,
    baseline: SystemFacts,
    prompts: list[Prompt],
    test: list[Prompt],
    models: ModelHolder,
    media: ImageMedia,
) -> tuple[SystemFacts, dict[str, Any]]:
    """Sweep the baseline's guidance over the validation prompts (`control_prompts`); `test` are the test prompts.

    Returns the control as a system, and the record of the sweep as results.json and the report show it.
    """
    entries = [entry for entry in config.rewards if entry.title in control.rewards]
    overlap = len({prompt.text for prompt in prompts} & {prompt.text for prompt in test})
    if overlap:
        note(f"guidance control: {overlap} of the validation prompts are test prompts too, which favours the control")
    folder = Path(config.output) / "control"
    stores: dict[str, ImageStore] = {}
    for guidance in control.guidances:
        candidate = _at_guidance(baseline, guidance)
        stores[candidate.name] = draw_system(config, candidate, prompts, folder, models, media)
    scores, facts = score_all(entries, stores, Path(config.output) / "cache")
    ranks = mean_ranks(scores, facts)
    best = control.guidances[int(np.argmin(ranks))]
    system = _at_guidance(baseline, best)
    points = [
        {
            "guidance": guidance,
            "mean_rank": float(rank),
            "rewards": {label: _point(scores[label][name], config.resamples) for label in scores},
        }
        for guidance, name, rank in zip(control.guidances, stores, ranks, strict=True)
    ]
    record = {
        "system": system.name,
        "chosen": best,
        "rewards": control.rewards,
        "prompts_from": control.prompts,
        "prompts": len(prompts),
        "seeds": config.seeds,
        "test_prompts_among_them": overlap,
        "points": points,
    }
    return system, record


def mean_ranks(scores: dict[str, Scores], facts: dict[str, RewardFacts]) -> np.ndarray:
    """Rank the stores under each reward (0: best mean; equal means share a rank) and average over the rewards."""
    ranks = []
    for label, by_store in scores.items():
        sign = -1 if facts[label].higher_is_better else 1
        means = sign * np.array([values.mean() for values in by_store.values()])
        ranks.append([(means < mean).sum() + 0.5 * ((means == mean).sum() - 1) for mean in means])
    return np.mean(ranks, axis=0)


def _at_guidance(baseline: SystemFacts, guidance: float) -> SystemFacts:
    return replace(baseline, name=f"{baseline.name}@guidance={guidance:g}", guidance=guidance, control=True)


def _point(scores: np.ndarray, resamples: int) -> dict[str, Any]:
    summary = summarise(scores, resamples=resamples)
    return {"mean": summary.mean, "ci95": summary.ci95}
