"""Evaluation while training: the interface of an evaluator and its result."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from PIL.Image import Image

from mmalign.config.sections import EvaluateConfig


class Evaluated(NamedTuple):
    """The result of an evaluation.

    `scores`: "evaluation/NAME" -> mean; `spreads`: the standard deviation over prompts, where there is one; `picture`:
    samples of the model.
    """

    scores: dict[str, float]
    spreads: dict[str, float]
    picture: Image | None = None


class Evaluator(Protocol):
    """Evaluates the same fixed inputs every time, so that two evaluations differ by the weights alone."""

    config: EvaluateConfig

    def higher_is_better(self, name: str) -> bool:
        """Tell whether more of a reward is better."""
        ...

    def lower_is_better(self) -> set[str]:
        """Return the names of the rewards of which less is better."""
        ...

    def evaluate(self, run: Any) -> Evaluated:
        """Evaluate the present model of a run."""
        ...
