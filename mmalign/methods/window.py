"""Which sampling steps of a round are random: a window that all samples of the round share.

Where the samples of one group are perturbed at different steps, their rewards differ by the step as well as by the
noise, and runs are reported to collapse (verl-omni). So there is one window a round, drawn from the run's seed.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from mmalign.methods.base import MethodConfig

Steps = range
"""The class: a field below has its name."""


class WindowConfig(MethodConfig):
    """The random steps of a round; the others are deterministic, and nothing of them is kept."""

    size: int = Field(3, ge=0)
    """steps of the window; 0: all steps but the last"""
    range: tuple[int, int] | None = None
    """steps that windows lie in, [first, end), counted from 0; null: the first half, or as many as the window has"""
    order: Literal["random", "progressive"] = "random"
    """random: drawn uniformly each round; progressive: moves on and starts again at the end, as in MixGRPO"""
    stride: int = Field(1, ge=0)
    """progressive: steps by which the window moves; 0: it stays at the first"""
    every: int = Field(25, ge=1)
    """progressive: rounds between two moves"""

    @model_validator(mode="after")
    def _fits(self) -> WindowConfig:
        if self.range is not None and not 0 <= self.range[0] <= self.range[1] - max(self.size, 1):
            raise ValueError(f"range {list(self.range)} must start at 0 or later and hold {self.size} steps (size)")
        if self.range is not None and self.size == 0:
            raise ValueError("range is for windows of a size above 0; remove it, or set size")
        if self.order == "random" and (self.stride, self.every) != (1, 25):
            raise ValueError("stride and every are for order: progressive; set it, or remove them")
        return self

    def candidates(self, steps: int) -> Steps:
        """Return the steps that a window may hold.

        Raises:
            ValueError: they pass the last but one of `steps`.
        """
        end = max(steps // 2, self.size) if self.size else steps - 1
        low, high = self.range or (0, end)
        if not high <= steps - 1:
            raise ValueError(
                f"window: steps {low} to {high} of {steps} sampling_steps; the last adds next to no noise: end at "
                f"{steps - 1} or before"
            )
        return Steps(low, high)

    def of_round(self, number: int, steps: int, source: torch.Generator) -> Steps:
        """Return the window of a round, counted from 0."""
        pool = self.candidates(steps)
        size = self.size or len(pool)
        starts = len(pool) - size + 1
        if self.order == "progressive":
            start = number // self.every * self.stride % starts
        else:
            start = int(torch.randint(starts, (1,), generator=source))
        return pool[start : start + size]
