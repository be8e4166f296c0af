"""Methods that learn from the log-probs of eta-DDIM's random steps; the engine is `mmalign.methods.rollout`."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from pydantic import Field

from mmalign.methods.base import Needs
from mmalign.methods.rollout import RatioError, Rollout, RolloutMethod, SamplingPlan
from mmalign.methods.run import Run
from mmalign.methods.sampling import RandomSamplingConfig, SamplingMethod

__all__ = ["RatioError", "Rollout", "TrajectoryConfig", "TrajectoryMethod"]


class TrajectoryConfig(RandomSamplingConfig):
    """Base of the configurations of methods that learn from recorded trajectories."""

    kl_weight: float = Field(0.0, ge=0)
    """adds this many times the KL divergence to the reference, a mean over learned sampling steps and dimensions"""
    distance_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of the guided predictions of policy and reference"""


ConfigT = TypeVar("ConfigT", bound=TrajectoryConfig)


class TrajectoryMethod(SamplingMethod[ConfigT], RolloutMethod[ConfigT]):
    """Base of methods that learn from the log-probabilities of their own samples; `loss` takes a `Rollout`."""

    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="blackbox")

    def __init__(self, config: ConfigT) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.kl_weight, self.distance_weight = config.kl_weight, config.distance_weight

    def plan(self, run: Run) -> SamplingPlan:
        """Return the kernel for all steps, and the part of them that is learned from."""
        return SamplingPlan(self.kernel(), self.config.sampling_steps, True, self.learned())
