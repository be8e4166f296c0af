"""A reference that moves: every so many steps it follows the policy's weights by a part of the way (RealDPO).

Source: Cheng et al., "RealDPO: Real or Not Real, that is the Preference" (arXiv 2510.14955) and the authors' code
(Vchitect/RealDPO, ``update_ref``): every 100 steps, reference = 0.999 reference + 0.001 policy.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmalign.core.ema import Shadow
from mmalign.methods.base import MethodConfig
from mmalign.methods.forward_process import predict_by
from mmalign.methods.noising import Noised
from mmalign.methods.run import Run


class RefreshedReferenceConfig(MethodConfig):
    """Base of configurations whose reference may follow the policy."""

    reference_every: int | None = Field(None, ge=1)
    """steps after which the reference moves towards the policy, 100 in RealDPO; null: frozen"""
    reference_decay: float = Field(0.999, ge=0, lt=1)
    """what is left of the reference then, the rest is the policy; 0: a copy of the policy"""

    @model_validator(mode="after")
    def _decay_is_of_a_refreshed_reference(self) -> RefreshedReferenceConfig:
        if self.reference_every is None and self.reference_decay != type(self).model_fields["reference_decay"].default:
            raise ValueError("reference_decay is for a reference that is refreshed; set reference_every, or remove it")
        return self


class RefreshedReference:
    """A copy of the trainable weights that follows them every `every` steps: decay * copy + (1 - decay) * weights."""

    def __init__(self, network: nn.Module, *, every: int, decay: float) -> None:
        """Start at the policy."""
        self._weights = Shadow({name: one for name, one in network.named_parameters() if one.requires_grad})
        self._every, self._decay = every, decay

    def predict(self, run: Run, noised: Noised) -> Float[Tensor, "batch *latent"]:
        """Return the reference's output, without a graph."""
        return predict_by(run, self._weights, noised)

    def after_update(self, step: int) -> None:
        """Let the reference follow after update number `step` (0-based), when it is time."""
        if (step + 1) % self._every == 0:
            self._weights.follow(self._decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return the copy for a checkpoint."""
        return self._weights.shadow

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._weights.restore(dict(tensors))
