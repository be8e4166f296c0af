"""One DPO step of a vision-language model: ours, where a pair's answers share a row, and with a row an answer.

On the shipped video language model and random videos of its size: speed does not depend on what is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.timing import Report, Settings, interleave
from mmalign.core.resources import resolve_model
from mmalign.losses import completion_sum, dpo
from mmalign.training.optim import build_optimizer
from pipelines import VisionLanguageModel, VlmBatch, load_vlm

MODEL, BETA, RANK = "assets/shapes-vlm", 0.1, 32
OURS, APART, ONE = "mmalign", "a row an answer", "one answer a pair"
QUESTION = (
    "In which direction does the green star move?\nA. upwards\nB. it does not move\nC. downwards\n"
    "Please directly give the best option:"
)
DESCRIPTION = "The green star moves upwards, and then the small red circle comes and grows. " * 2
ANSWERS = {"labels": ("A", "B"), "descriptions": (DESCRIPTION, DESCRIPTION.replace("upwards", "downwards"))}


def measure(settings: Settings) -> list[Report]:
    """Return a report for answers of a token or two, and one for descriptions."""
    return [_compare(kind, answers, settings) for kind, answers in ANSWERS.items()]


def _compare(kind: str, answers: tuple[str, str], settings: Settings) -> Report:
    model = load_vlm(resolve_model(MODEL), device=settings.device)
    model.add_adapter(RANK, seed=0)
    draw = torch.Generator().manual_seed(0)
    videos = [torch.randint(0, 256, (8, 3, 48, 48), generator=draw).to(torch.uint8) for _ in range(settings.batch)]
    asked = [model.encode_prompt(QUESTION, [video]) for video in videos]
    chosen, rejected = ([model.complete(one, answer) for one in asked] for answer in answers)
    together, alone = model.collate([*chosen, *rejected]), model.collate(chosen)
    apart = replace(together, prompts=())
    with torch.no_grad():
        values, expected = (model.log_probs(batch)[0] for batch in (together, apart))
    sides = {
        OURS: _step(model, together),
        APART: _step(model, apart),
        ONE: _passes(model, alone),
    }
    held = int(alone.attention_mask.sum()) // len(alone), int(alone.completion_mask.sum()) // len(alone)
    return Report(
        f"DPO step on answers, lora, {settings.batch} pairs, {kind}, float32",
        interleave(sides, settings),
        {f"{APART} / {OURS}": (APART, OURS), f"{OURS} / {ONE}": (OURS, ONE)},
        images=settings.batch,
        facts={
            "tokens a sample": f"{held[0]}, {held[1]} of them the answer",
            "max difference of log-probabilities": f"{(values - expected).abs().max().item():.1e}",
            "spread of log-probabilities": f"{expected[expected != 0].std().item():.1e}",
        },
    )


def _step(model: VisionLanguageModel, batch: VlmBatch) -> Callable[[], None]:
    """Return a step on both answers of every pair, the reference by switching the adapter off."""
    parameters = model.trainable_parameters()
    optimizer = build_optimizer(parameters, learning_rate=1e-6)

    def step() -> None:
        policy = completion_sum(*model.log_probs(batch)).chunk(2)
        with torch.no_grad(), model.adapter_disabled():
            reference = completion_sum(*model.log_probs(batch)).chunk(2)
        dpo(*policy, *reference, beta=BETA).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _passes(model: VisionLanguageModel, batch: VlmBatch) -> Callable[[], None]:
    """Return forward, backward and a reference forward on one answer a pair, and nothing else."""

    def passes() -> None:
        model.log_probs(batch)[0].sum().backward()
        model.network.zero_grad()
        with torch.no_grad(), model.adapter_disabled():
            model.log_probs(batch)

    return passes
