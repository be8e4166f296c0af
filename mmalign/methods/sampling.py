"""Options of methods that draw their own samples, and the random steps of eta-DDIM that some of them learn from."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import Field

from mmalign.core.errors import UserError
from mmalign.methods.base import Method, MethodConfig
from pipelines import Kernel, ddim
from pipelines.noise import NoiseProcess


class DrawConfig(MethodConfig):
    """Base of the configurations of methods that draw their own samples."""

    sampling_steps: int = Field(50, ge=1)
    """steps of the sampler"""
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """classifier-free guidance scale while sampling and learning; 1: none"""
    images_per_prompt: int = Field(1, ge=1)
    """images sampled for each prompt of a batch"""


class SamplingConfig(DrawConfig):
    """Base of the configurations of methods that sample by eta-DDIM."""

    eta: float = Field(1.0, ge=0, le=1)
    """noise of the sampler: 1 as in DDPM, 0 deterministic"""


class RoundConfig(DrawConfig):
    """Base of the configurations of methods that learn in rounds from their own samples."""

    updates_per_round: int = Field(1, ge=1)
    """passes over one round of samples; each is one optimiser step, or one for each of its mini-batches"""
    mini_batches: int = Field(1, ge=1)
    """parts that each pass over a round is shuffled and cut into, one optimiser step each; 1: all of it at once"""


class RandomSamplingConfig(SamplingConfig, RoundConfig):
    """Base of the configurations of methods that learn from the random steps of their samples."""

    random_steps: tuple[float, float] = (0.0, 1.0)
    """part of the sampling (0 is its start) whose steps are random; the others are deterministic"""
    learned_steps: tuple[float, float] | None = None
    """part of the sampling whose random steps are trained on; null: all random steps"""


RoundT = TypeVar("RoundT", bound=RoundConfig)
SamplingT = TypeVar("SamplingT", bound=RandomSamplingConfig)


class RoundMethod(Method[RoundT]):
    """Base of methods that learn in rounds from their own samples."""

    def __init__(self, config: RoundT) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.images_per_sample = config.images_per_prompt
        self.updates_per_round = config.updates_per_round * config.mini_batches


class SamplingMethod(RoundMethod[SamplingT]):
    """Base of methods whose samples have random steps: the selection of these steps, and checks of the sampler."""

    def check(self, process: NoiseProcess) -> None:
        """Refuse a sampler without randomness, or one that the schedule does not support."""
        if self.config.eta == 0:
            raise UserError(
                f"method.eta is 0, and {self.name} needs a random sampler: without noise a step has no density; "
                "set method.eta to 1"
            )
        c, stds = self.config, self.kernel().stds(process, self.config.sampling_steps)
        for name, steps in (("random_steps", range(len(stds))), ("learned_steps", self.learned())):
            if not any(stds[step] for step in steps):
                raise UserError(
                    f"method.{name} {list(getattr(c, name) or c.random_steps)} holds none of the {c.sampling_steps} "
                    "steps that have noise; 0 <= start < end <= 1 is needed, such as [0.0, 0.5] (the last may have "
                    "none)"
                )

    def kernel(self) -> Kernel:
        """Return the kernel of the sampling: DDIM of noise eta in the random part, 0 elsewhere."""
        c = self.config
        random = self._part(c.random_steps)
        return ddim([c.eta if index in random else 0.0 for index in range(c.sampling_steps)])

    def learned(self) -> range:
        """Return the part of the sampling whose random steps are learned from."""
        return self._part(self.config.learned_steps or (0.0, 1.0))

    def _part(self, shares: tuple[float, float]) -> range:
        """Return a part of the sampling, given by its start and its end as shares, in steps."""
        low, high = (round(share * self.config.sampling_steps) for share in shares)
        return range(self.config.sampling_steps)[max(low, 0) : max(high, 0)]
