"""Exponential moving average of the trainable parameters: the weights that are evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Keeps shadow = d * shadow + (1 - d) * parameter, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up of d (as in the EMA of TensorFlow and diffusers) lets the average leave the starting point in short
    runs. It costs one float copy of the trainable parameters.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        """Start the average at the current values.

        Raises:
            ValueError: decay is outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} must lie in [0, 1)")
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current values; call once after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model inside the context, and restore the trained values afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data

    @torch.no_grad()
    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
        self.updates = updates
