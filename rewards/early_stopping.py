"""Choose the step of a training run by a reward on validation images.

Source: Miao et al. 2024 (RPO, NeurIPS 2024), where the lambda-Harmonic reward over the training prompts, without the
subject's placeholder, picks the model: text forgetting sets in long before the loss shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float

from rewards.errors import RewardError

if TYPE_CHECKING:
    from torch import Tensor


class EarlyStopping:
    """Keep the step with the greatest mean validation reward, looked at every 40 steps unless told otherwise.

    `update` says whether to save. patience: after how many validations without a new best `should_stop` is true; None,
    as in RPO, never. Ties go to the earlier step.
    """

    def __init__(self, *, every: int = 40, patience: int | None = None) -> None:
        """Start without a best step."""
        if every < 1 or (patience is not None and patience < 1):
            raise RewardError(f"early stopping: every={every}, patience={patience}; at least 1 is allowed")
        self.every, self.patience = every, patience
        self.best, self.best_step, self.waited = -math.inf, -1, 0

    def due(self, step: int) -> bool:
        """Tell whether to validate after this many steps."""
        return step % self.every == 0

    def update(self, step: int, scores: Float[Tensor, " samples"]) -> bool:
        """Take the scores of a validation; true where their mean is the best so far, so that the model is kept."""
        mean = scores.double().mean().item()
        if not math.isfinite(mean):
            raise RewardError(f"early stopping: the validation scores of step {step} have the mean {mean}")
        if mean > self.best:
            self.best, self.best_step, self.waited = mean, step, 0
            return True
        self.waited += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether patience is exhausted."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, float | int]:
        """Return what a resumed run needs."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Continue where `state_dict` was taken."""
        self.best, self.best_step, self.waited = state["best"], int(state["best_step"]), int(state["waited"])
