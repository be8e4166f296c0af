"""Rounds of a method that learns by the forward process, on a tiny model: two micro-batches of two prompts."""

from __future__ import annotations

from typing import Any

import torch

from mmalign.data.batches import PromptBatch
from mmalign.methods.forward_process import ForwardProcessMethod, ScoredSamples
from mmalign.methods.run import Run
from rewards import Reward


def prompts(run: Run, *texts: str) -> PromptBatch:
    return PromptBatch(list(texts), run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])


def collect(run: Run, method: ForwardProcessMethod[Any]) -> list[ScoredSamples]:
    return method.collect(run, [prompts(run, "a red circle", "a star"), prompts(run, "red", "two blue squares")])


def move(run: Run, factor: float = 1.3) -> None:
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.mul_(factor)
    run.step += 1


def weights(run: Run) -> list[torch.Tensor]:
    return [one.detach().clone() for one in run.generator.trainable_parameters()]


def gradient(run: Run, method: ForwardProcessMethod[Any], batches: list[ScoredSamples]) -> list[torch.Tensor]:
    parameters = run.generator.trainable_parameters()
    for one in parameters:
        one.grad = None
    for batch in batches:
        method.learn(run, batch, lambda loss: (loss / 2).backward())
    return [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in parameters]


class Redness(Reward):
    """Minus 100 times the mean of red; less is better."""

    name = "redness"
    higher_is_better = False

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return 100 * media[:, 0].mean((1, 2))
