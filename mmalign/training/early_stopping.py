"""Keep the weights that scored best on the held-out prompts, and say when it is time to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core.progress import note


class Best:
    """The best weights so far by one reward of the looks; `exhausted` once `patience` looks in a row were not better.

    Costs one copy of the trainable parameters.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], reward: str, patience: int, higher: bool = True) -> None:
        """Watch `reward`, of which more is better unless `higher` is False."""
        self.parameters, self.reward, self.patience = parameters, reward, patience
        self.sign = 1.0 if higher else -1.0
        self.step, self.value, self.misses = -1, -float("inf"), 0
        self.weights: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether enough looks in a row were no better than the best."""
        return self.misses >= self.patience

    @torch.no_grad()
    def look(self, step: int, scores: dict[str, float]) -> None:
        """Take note of a look; the parameters must hold what was looked at."""
        value = self.sign * scores[f"evaluation/{self.reward}"]
        if value > self.value:
            self.step, self.value, self.misses = step, value, 0
            self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            return
        self.misses += 1
        if self.exhausted:
            note(
                f"step {step}: {self.reward} has not got better than {self.sign * self.value:.4f} (step {self.step}) "
                f"for {self.misses} looks; stopping, with the weights of step {self.step}"
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the best weights into the model inside the context, and the present ones back afterwards."""
        present = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.weights[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = present[name]

    def state(self) -> dict[str, Any]:
        """Return the plain values of a checkpoint; the weights are `self.weights`."""
        return {"reward": self.reward, "step": self.step, "value": self.value, "misses": self.misses}

    def load(self, values: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from a checkpoint, if it was the same reward that was watched."""
        if values.get("reward") != self.reward:
            return
        self.step, self.value, self.misses = values["step"], values["value"], values["misses"]
        self.weights = {name: tensor.to(self.parameters[name].device) for name, tensor in weights.items()}
