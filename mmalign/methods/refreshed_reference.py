"""A reference that moves: every so many steps it becomes the moving average of the policy's weights (RealDPO).

Source: Cheng et al., "RealDPO: Real or Not Real, that is the Preference" (arXiv 2510.14955) and the authors' code
(Vchitect/RealDPO): decay 0.999, every 100 steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmalign.core.ema import Shadow
from mmalign.methods.base import MethodConfig
from mmalign.methods.forward_process import predict_by
from mmalign.methods.noising import Noised
from mmalign.methods.run import Run

_AVERAGE, _REFERENCE = "average.", "reference."


class RefreshedReferenceConfig(MethodConfig):
    """Base of configurations whose reference may follow the policy."""

    reference_every: int | None = Field(None, ge=1)
    """steps after which the reference becomes the average of the policy's weights, 100 in RealDPO; null: frozen"""
    reference_decay: float = Field(0.999, ge=0, lt=1)
    """decay of that average, a step"""

    @model_validator(mode="after")
    def _decay_is_of_a_refreshed_reference(self) -> RefreshedReferenceConfig:
        if self.reference_every is None and self.reference_decay != type(self).model_fields["reference_decay"].default:
            raise ValueError("reference_decay is for a reference that is refreshed; set reference_every, or remove it")
        return self


class RefreshedReference:
    """Two copies of the trainable weights: the reference, and the average that it becomes next."""

    def __init__(self, network: nn.Module, *, every: int, decay: float) -> None:
        """Start both at the policy."""
        parameters = {name: one for name, one in network.named_parameters() if one.requires_grad}
        self._average, self._weights = Shadow(parameters), Shadow(parameters)
        self._every, self._decay = every, decay

    def predict(self, run: Run, noised: Noised) -> Float[Tensor, "batch *latent"]:
        """Return the reference's output, without a graph."""
        return predict_by(run, self._weights, noised)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Let the average follow update number `step` (0-based), and the reference the average when it is time."""
        self._average.follow(self._decay)
        if (step + 1) % self._every == 0:
            self._weights.restore(self._average.shadow)

    def tensors(self) -> dict[str, Tensor]:
        """Return both copies for a checkpoint."""
        both = ((_AVERAGE, self._average), (_REFERENCE, self._weights))
        return {prefix + name: value for prefix, held in both for name, value in held.shadow.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for prefix, held in ((_AVERAGE, self._average), (_REFERENCE, self._weights)):
            held.restore({name: tensors[prefix + name] for name in held.shadow})
