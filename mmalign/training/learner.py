"""Learners, driven by the loop: trainable weights, their optimiser, one update, and the state for checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core import distributed
from mmalign.core.cost import COUNTERS
from mmalign.core.errors import TrainingDiverged
from mmalign.core.seeds import derive_seed
from mmalign.data.sampler import BatchSampler
from mmalign.methods.run import BaseRun
from mmalign.training.checkpoint import Checkpoint, list_checkpoints
from mmalign.training.optim import (
    average_gradients,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
)
from mmalign.training.tracking import MetricBuffer


class Learner(ABC):
    """Weights under an optimiser. A subclass defines the batches of an update (`batches`) and their loss (`learn`).

    Attributes: `unit` and `samples_per_step`, the unit of progress; `recipe`, the values that must be equal to resume
    a run, flat "section.key" -> value.
    """

    unit = "images"

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        run: BaseRun[Any],
        sampler: BatchSampler,
        settings: Any,
        accelerator: Any,
        recipe: dict[str, Any],
        samples_per_step: int,
        checkpoints: Path,
    ) -> None:
        """Keep the parts.

        `settings` is a `trainer` section; `checkpoints` is the folder of the last sound one, named if the run
        diverges.
        """
        self.parameters, self.run, self.sampler, self.settings = parameters, run, sampler, settings
        self.accelerator, self.recipe, self.samples_per_step = accelerator, recipe, samples_per_step
        self.optimizer = accelerator.prepare(optimizer)
        self.checkpoints = checkpoints
        self.totals = run.cost.counts()
        self._buffer = MetricBuffer()

    @abstractmethod
    def batches(self, step: int) -> Iterable[Any]:
        """Return the micro-batches whose gradients update `step` (0-based) adds up."""

    @abstractmethod
    def learn(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Add the gradient of a micro-batch and return its metrics."""

    def after_update(self) -> None:  # noqa: B027 (a hook)
        """Act after the optimiser's step; by default do nothing."""

    def between_rounds(self, step: int) -> bool:
        """Tell whether a run can be resumed after `step` updates; not while a round of samples is being used."""
        return True

    def epoch(self, step: int) -> float:
        """Return the number of passes over the data after `step` updates."""
        return step / self.sampler.steps_per_epoch

    def update(self, step: int) -> None:
        """Do one optimiser step."""
        s, self.run.step = self.settings, step
        # For draws without a sample's seed, such as dropout; different on each rank, which has other samples.
        torch.manual_seed(derive_seed(s.seed, "step", step, distributed.rank()))
        factor = learning_rate_factor(step, s.steps, s.warmup, s.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * factor
        for batch in self.batches(step):
            self._buffer.add(step + 1, self.learn(batch))
        parameters = list(self.parameters.values())
        average_gradients(parameters, distributed.world_size())
        norm = self.accelerator.clip_grad_norm_(parameters, s.max_grad_norm)
        self._buffer.add(step + 1, {"grad_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()
        self.run.step = step + 1

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; a step's gradient is the mean over its micro-batches."""
        self.accelerator.backward(loss / self.settings.gradient_accumulation)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the means of all metrics since the last call, over all processes.

        Raises:
            TrainingDiverged: a loss or a gradient norm was not finite.
        """
        rows = self._buffer.read(self.accelerator.device)
        self._check_finite(rows)
        columns: dict[str, list[float]] = {}
        for _, name, value in rows:
            columns.setdefault(name, []).append(value)
        means = {name: _mean(column) for name, column in columns.items()}
        everyone = distributed.gather(means)  # one whose mini-batches were empty has fewer names
        names = dict.fromkeys(name for one in everyone for name in one)
        means = {name: _mean([one[name] for one in everyone if name in one]) for name in names}
        rate: float = self.optimizer.param_groups[0]["lr"]
        return {**means, "learning_rate": rate, "epoch": self.epoch(step), **self.count()}

    def count(self) -> dict[str, float]:
        """Return the use of all processes so far: counts added up, the seconds of the slowest."""
        self.totals = self.run.cost.counts()
        if distributed.world_size() > 1:
            everyone = distributed.gather(self.totals)
            self.totals = {name: sum(one[name] for one in everyone) for name in COUNTERS}
            self.totals["seconds"] = max(one["seconds"] for one in everyone)
        return self.totals

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return groups of tensors and plain values, the arguments of `load`."""
        tensors = {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": optimizer_tensors(self.optimizer, list(self.parameters)),
        }
        values: dict[str, Any] = {"cost": self.totals}
        if self.accelerator.scaler is not None:
            values["scaler"] = self.accelerator.scaler.state_dict()
        return tensors, values

    def load(self, saved: Checkpoint) -> None:
        """Restore from a checkpoint, which holds the result of `state`."""
        self.run.step = saved.step
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.tensors["weights"][name])
        load_optimizer_tensors(self.optimizer, list(self.parameters), saved.tensors["optimizer"])
        if "cost" in saved.values:  # until 0.1 a latent reward's run counted none
            self.run.cost.load(saved.values["cost"], distributed.rank(), distributed.world_size())
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.values["scaler"])

    def _check_finite(self, rows: list[tuple[int, str, float]]) -> None:
        # With fp16 the scaler finds its scale by infinite gradients, and skips such steps itself.
        watched = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
        for step, name, value in rows:
            if name in watched and not math.isfinite(value):
                saved = list_checkpoints(self.checkpoints)
                last = f"the last sound checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
                raise TrainingDiverged(
                    f"the {name.replace('_', ' ')} became {value} at step {step}; nothing was saved after it, {last}. "
                    "Lower trainer.learning_rate, or use trainer.precision bf16 or fp32"
                )


def _mean(values: Sequence[float]) -> float:
    """Return the mean; NaN where both infinities are among the values."""
    return math.fsum(values) / len(values) if {math.inf, -math.inf} - set(values) else math.nan
