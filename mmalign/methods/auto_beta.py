"""The beta of DPO that follows the margins, so that a pair keeps a chosen share of its gradient (SimpleTuner)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.distributed import mean
from mmalign.losses import beta_of_margin


class AutoBeta:
    """A beta for the whole of an optimiser step, from the mean |margin| of the steps before.

    A margin is the difference of the two sides' gains in error, without beta. Steps in which it is 0 everywhere, as
    where the policy is still the reference, do not count. The average is that of the steps seen, with no weight on the
    0 that it starts from.

    >>> auto = AutoBeta(target=0.2, decay=0.99, least=1.0, most=1e6)
    >>> auto.see(torch.tensor([0.001, -0.001]))
    >>> auto.step()
    >>> round(auto.beta(default=2000.0), 1)
    2772.6
    """

    def __init__(self, *, target: float, decay: float, least: float, most: float) -> None:
        """Start without margins; beta is chosen so that sigmoid(-z) is `target`, in [least, most]."""
        self.target, self.decay, self.least, self.most = target, decay, least, most
        self._sum, self._steps = 0.0, 0
        self._seen: list[Tensor] = []

    def beta(self, default: float) -> float:
        """Return beta for the present step; `default` as long as there have been no margins."""
        if not self._steps:
            return default
        recent = self._sum / (1 - self.decay**self._steps)
        return min(max(beta_of_margin(recent, target=self.target), self.least), self.most)

    def see(self, margins: Float[Tensor, " pairs"]) -> None:
        """Take note of the margins of a micro-batch."""
        self._seen.append(margins.detach().abs().mean())

    def step(self) -> None:
        """Add the mean over the step's micro-batches and all processes to the average."""
        found = float(mean(torch.stack(self._seen).mean()))
        self._seen.clear()
        if found > 0:
            self._sum, self._steps = self.decay * self._sum + (1 - self.decay) * found, self._steps + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average for a resumed run."""
        return {"sum": self._sum, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sum, self._steps = state["sum"], state["steps"]
