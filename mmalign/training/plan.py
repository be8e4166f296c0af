"""The plan of a run in numbers, and a check that the data suffice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.config.run import RunConfig
from mmalign.core.errors import UserError
from mmalign.methods.base import Method
from mmalign.training.optim import warmup_steps
from mmalign.training.tasks import task_of


@dataclass
class Plan:
    """The plan of a run in numbers."""

    method: str
    samples: int
    steps: int
    samples_per_step: int
    images_per_step: int
    unit: str
    epochs: float | None
    """Passes over the data; None: the samples decide how many steps a round of them has."""
    trainable: int
    parameters: int
    warmup: int
    data: str

    def __str__(self) -> str:
        """Return the plan as indented lines."""
        passes = "as many passes as the rounds take"
        if self.epochs is not None:
            passes = f"{self.epochs:.2f} passes" if self.epochs < 10 else f"{self.epochs:.0f} passes"
        share = 100 * self.trainable / self.parameters
        return "\n".join(
            [
                f"  method     {self.method}",
                f"  data       {self.data}",
                f"  steps      {self.steps} of {self.samples_per_step} samples ({self.images_per_step} {self.unit}) "
                f"each: {passes} over the data; warm-up {self.warmup} steps",
                f"  trainable  {self.trainable:,} of {self.parameters:,} parameters ({share:.3g} %)",
            ]
        )


def check_enough(samples: int, config: RunConfig, world_size: int, unit: str = "pairs") -> None:
    """Refuse data that do not fill one step, before any encoding.

    Raises:
        UserError: names the number of samples of a step.
    """
    trainer = config.trainer
    per_step = trainer.batch_size * trainer.gradient_accumulation * world_size
    if samples < per_step:
        raise UserError(
            f"the data holds {samples} {unit} and one step takes {per_step} (trainer.batch_size {trainer.batch_size} "
            f"x gradient_accumulation {trainer.gradient_accumulation} x {world_size} processes); lower it or give more"
        )


def check_files(source: Any, name: str) -> None:
    """Refuse data, read from `name`, whose records name files that do not exist.

    Only sources of paths are looked through, by their first record: elsewhere a record costs the bytes of its images.

    Raises:
        UserError: says how many files are missing, and which is the first.
    """
    if not _paths(source[0]):
        return
    files = dict.fromkeys(path for index in range(len(source)) for path in _paths(source[index]))
    missing = [path for path in files if not os.path.exists(path)]
    if missing:
        raise UserError(
            f"{name}: {len(missing)} of the {len(files)} files that it names do not exist (first: {missing[0]}); add "
            "them, or remove their rows"
        )


def _paths(record: Any) -> list[Path]:
    return [value for value in getattr(record, "__dict__", {}).values() if isinstance(value, Path)]


def make_plan(config: RunConfig, method: Method[Any], samples: int, generator: Any, world_size: int = 1) -> Plan:
    """Return the numbers of a run whose model is already made trainable."""
    trainer = config.trainer
    rounds = trainer.steps / method.updates_per_round
    per_step = trainer.batch_size * trainer.gradient_accumulation * world_size
    left = samples % per_step
    return Plan(
        method=method.describe(),
        samples=samples,
        steps=trainer.steps,
        samples_per_step=per_step,
        images_per_step=per_step * method.images_per_sample,
        unit=task_of(config).unit,
        epochs=None if method.rounds_vary else rounds / (samples // per_step),
        trainable=sum(p.numel() for p in generator.trainable_parameters()),
        parameters=sum(p.numel() for p in generator.network.parameters()),
        warmup=warmup_steps(trainer.warmup, trainer.steps),
        data=f"{samples} {method.needs.source} of {config.data.pairs or config.data.labels or config.data.prompts}"
        + (f", {left} left over in each pass" if left else ""),
    )
