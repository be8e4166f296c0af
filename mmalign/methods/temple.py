"""TEMPLE: DPO on answers about perturbed videos, from easy perturbations to hard ones (arXiv 2503.16929)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from mmalign.core.errors import UserError
from mmalign.methods.vlm_dpo import VlmDPO, VlmDPOConfig


class TempleConfig(VlmDPOConfig):
    """Configuration of `temple`: that of `vlm_dpo`, and the order of the stages."""

    stages: list[int] = Field([16, 8, 4, 2], min_length=1)
    """values of the data's column `difficulty`, in the order of training, `trainer.steps` steps on each"""

    @field_validator("stages")
    @classmethod
    def _each_once(cls, stages: list[int]) -> list[int]:
        if len(set(stages)) < len(stages):
            raise ValueError(f"{stages} contains a difficulty twice; give each difficulty once")
        return stages


class Temple(VlmDPO):
    """Prefer the chosen answer, in stages of growing difficulty; the model at a stage's start is its reference."""

    name: ClassVar[str] = "temple"
    Config = TempleConfig

    def __init__(self, config: TempleConfig) -> None:
        """Take the order of the stages from the configuration."""
        super().__init__(config)
        self.stages = tuple(config.stages)

    def check_data(self, source: Any) -> None:
        """Refuse data that have no pairs for one of the stages."""
        super().check_data(source)
        found = source.difficulties()
        empty = [stage for stage in self.stages if stage not in found]
        if empty:
            raise UserError(
                f"temple: {source.name} holds no pair of difficulty {', '.join(map(str, empty))} (column difficulty); "
                f"set method.stages to the difficulties in the data"
            )

    def describe(self) -> str:
        """Return the conventions of `vlm_dpo` and the stages."""
        return f"{super().describe()}; difficulty {' -> '.join(map(str, self.stages))}"
