"""The learner of a method: rounds of batches, its loss, the moving average, and its state between rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.config.run import RunConfig
from mmalign.core import distributed
from mmalign.core.ema import EMA
from mmalign.core.errors import UserError
from mmalign.training.checkpoint import Checkpoint
from mmalign.training.learner import Learner
from mmalign.training.optim import build_optimizer
from mmalign.training.output import CHECKPOINTS
from mmalign.training.prepare import Prepared
from mmalign.training.recipe import recipe


class MethodLearner(Learner):
    """The trainable weights of a model, and its method.

    A round is the result of one call of `method.collect`. It is cut into optimiser steps by `method.split`; a run can
    be resumed between rounds only, since a round's samples come from the policy before it.
    """

    def __init__(self, config: RunConfig, parts: Prepared, accelerator: Any) -> None:
        """Make the optimiser and the average of the trainable weights."""
        self.method, s = parts.method, config.trainer
        network = parts.run.model.network
        parameters = {name: one for name, one in network.named_parameters() if one.requires_grad}
        super().__init__(
            parameters,
            build_optimizer(
                parameters.values(), learning_rate=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay
            ),
            run=parts.run,
            sampler=parts.sampler,
            settings=s,
            accelerator=accelerator,
            recipe=recipe(config, parts.data_id, parts.model_id, distributed.world_size()),
            samples_per_step=parts.sampler.per_step * parts.method.images_per_sample,
            checkpoints=Path(config.output) / CHECKPOINTS,
        )
        self.unit = parts.task.unit
        self.ema = EMA(self.parameters, s.ema) if s.ema else None
        self.rounds = 0
        self._steps_of_round = 1
        self._pending: deque[Iterable[Any]] = deque()

    def batches(self, step: int) -> Iterable[Any]:
        """Return the batches of this step; collect the next round first if the last one is used up."""
        if not self._pending:
            collected = self.method.collect(self.run, self.sampler.micro_batches(self.rounds))
            self._pending.extend(self.method.split(self.run, collected))
            self._steps_of_round = len(self._pending)
            self.rounds += 1
        return self._pending.popleft()

    def learn(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Add the gradient of the method's loss."""
        return self.method.learn(self.run, batch, self.backward)

    def after_update(self) -> None:
        """Update the moving average, and what the method keeps."""
        if self.ema:
            self.ema.update()
        self.method.after_update(self.run)

    def between_rounds(self, step: int) -> bool:
        """Tell whether all of the last round is used up."""
        return not self._pending

    def epoch(self, step: int) -> float:
        """Return the number of passes over the data."""
        return (self.rounds - len(self._pending) / self._steps_of_round) / self.sampler.steps_per_epoch

    def averaged(self) -> AbstractContextManager[None]:
        """Return the context in which the network holds the weights to evaluate."""
        return self.ema.applied() if self.ema else nullcontext()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the state for a checkpoint; see `Learner.state`."""
        tensors, values = super().state()
        values |= {
            "method": self.method.state_dict(),
            "rounds": self.rounds,
            "steps_left_of_round": len(self._pending),
        }
        if held := self.method.tensors():
            tensors["method"] = held
        if self.ema:
            tensors["ema"] = self.ema.shadow
            values["ema_updates"] = self.ema.updates
        return tensors, values

    def load(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: the run ended in the middle of a round, and there are more steps now.
        """
        if saved.values.get("steps_left_of_round") and saved.step < self.settings.steps:
            raise UserError(
                f"the run ended at step {saved.step}, in the middle of a round of samples, and cannot be extended to "
                f"trainer.steps {self.settings.steps}: the rest of the round was made by the policy of before; choose "
                "another output, or start again with --resume never"
            )
        super().load(saved)
        if self.ema:
            self.ema.load(saved.tensors["ema"], saved.values["ema_updates"])
        self.rounds = saved.values.get("rounds", saved.step // self.method.updates_per_round)
        self.method.load_state_dict(saved.values["method"])
        self.method.load_tensors(saved.tensors.get("method", {}))
