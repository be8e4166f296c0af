"""Copies of the trainable weights that follow them: the moving average that is exported, or an earlier policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Shadow:
    """A copy of the trainable weights, which can take their place; one float copy in memory.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> shadow = Shadow({"weight": weight})
    >>> weight.data.add_(2.0)
    tensor([3.])
    >>> shadow.follow(0.5)  # 0.5 * 1 + 0.5 * 3
    >>> with shadow.applied():
    ...     weight.item()
    2.0
    >>> weight.item()
    3.0
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        """Start at the current values."""
        self.parameters = parameters
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Set shadow = decay * shadow + (1 - decay) * parameter; with decay 0 an exact copy."""
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the copy into the model inside the context, and restore the trained values afterwards."""
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
    def restore(self, shadow: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)


class EMA(Shadow):
    """Keeps shadow = d * shadow + (1 - d) * parameter, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up of d (as in the EMA of TensorFlow and diffusers) lets the average leave the starting point in short
    runs.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        """Start the average at the current values.

        Raises:
            ValueError: decay is outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} must lie in [0, 1)")
        super().__init__(parameters)
        self.decay = decay
        self.updates = 0

    def update(self) -> None:
        """Move the average towards the current values; call once after each optimiser step."""
        self.follow(min(self.decay, (1 + self.updates) / (10 + self.updates)))
        self.updates += 1

    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint."""
        self.restore(shadow)
        self.updates = updates
