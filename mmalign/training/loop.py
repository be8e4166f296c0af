"""The one training loop: update, log, evaluate, save, stop; for methods and for latent rewards alike.

A `Learner` is driven step by step; callbacks do everything besides the updates. Every random draw is a function of
(seed, sample, epoch) or of (seed, step), so a run that was killed and resumed logs the same losses, to the
bit, as one that was not, and batch size, accumulation and processes can trade places.

    loop = Loop(learner, config, [evaluation, early_stopping])
    loop.run(resume="auto")
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.config.run import dump_config
from mmalign.core import distributed
from mmalign.core.errors import TrainingInterrupted, UserError
from mmalign.core.files import write_atomically
from mmalign.core.interrupt import StopRequest, graceful_stop
from mmalign.core.progress import Track, memory_gigabytes, note, track
from mmalign.training.checkpoint import (
    Checkpoint,
    abandon_later,
    changed_schedule,
    check_same_recipe,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from mmalign.training.learner import Learner
from mmalign.training.output import CHECKPOINTS, CONFIG_FILE
from mmalign.training.recipe import set_aside
from mmalign.training.tracking import Metrics

SHOWN = ("loss", "accuracy", "reward")
"""Metrics that the progress bar shows."""


class Callback:
    """A hook beside the updates; every method does nothing by default.

    `name` is the key under which `state_dict` and `tensors` are kept in a checkpoint; empty: nothing is kept.
    """

    name = ""

    def begin(self, loop: Loop) -> None:
        """Act before the first update of a call, new or resumed."""

    def due(self, step: int) -> bool:
        """Tell whether `after_step` is wanted after this step; at the end of a run it is called in any case."""
        return False

    def logged(self, step: int, values: dict[str, float]) -> None:
        """Read a line of metrics before it is written, and add to it."""

    def after_step(self, loop: Loop) -> None:
        """Act after a step, between the line of metrics and the checkpoint."""

    def evaluated(self, step: int, scores: Mapping[str, float], spreads: Mapping[str, float]) -> None:
        """Receive the scores of an evaluation; the network holds the evaluated weights."""

    def ends_run(self) -> bool:
        """Tell whether the run is to stop now."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore from a checkpoint."""


class Loop:
    """Runs the steps of one training.

    Attributes: `step`, the number of updates done; `learner`; `metrics`, the log of metrics; `output`, the
    folder of the run; `finished`.
    """

    metrics: Metrics

    def __init__(self, learner: Learner, config: Any, callbacks: Sequence[Callback] = ()) -> None:
        """Prepare the run of `config`, into `output`; nothing is read or written yet."""
        self.learner, self.config, self.callbacks = learner, config, list(callbacks)
        self.settings = config.trainer
        self.output = Path(config.output)
        self.checkpoints = self.output / CHECKPOINTS
        self.step, self.finished = 0, False
        self._saved = 0  # step of the last checkpoint
        self._asked = 0  # step at which all processes were last asked whether to stop
        self._clock = (0, 0.0)  # step and time of the last line of metrics

    def run(self, resume: str = "auto") -> None:
        """Do the remaining steps; on return the network holds the last step's weights.

        `resume`: "auto" resumes from the last checkpoint if there is one, "never" starts again (keeping the earlier
        checkpoints aside), a path names the checkpoint to resume from.

        Raises:
            UserError: the checkpoint is damaged, of another recipe, or beyond the last step.
            TrainingDiverged: the loss is not finite. DiskFull: no room to save.
            TrainingInterrupted: Ctrl-C; a checkpoint was saved.
        """
        self.step = self._asked = self._restore(resume)
        self.learner.count()
        self.finished = self.step >= self.settings.steps or self._ended()
        self.output.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            write_atomically(self.output / CONFIG_FILE, dump_config(self.config))
        self.metrics = Metrics(self.output, self.config, self.learner.accelerator, self.step)
        each = self.learner.samples_per_step
        with (
            graceful_stop() as stop,
            track(self.settings.steps * each, "train", self.learner.unit, initial=self.step * each) as job,
        ):
            for callback in self.callbacks:
                callback.begin(self)
            self._clock = (self.step, time.monotonic())
            self.learner.run.cost.start()
            while not self.finished:
                self.learner.update(self.step)
                self.step += 1
                job.advance(each)
                self._after_step(stop, job)

    def _after_step(self, stop: StopRequest, job: Track) -> None:
        """Log, evaluate and save where due."""
        step, settings, learner = self.step, self.settings, self.learner
        between = learner.between_rounds(step)  # in the middle of a round no run could be resumed
        stopping = between and self._agree_to_stop(stop)
        saving = stopping or (between and self._saving_is_due())
        due = [callback for callback in self.callbacks if callback.due(step)]
        self.finished = step >= settings.steps or (between and self._ended())
        # Reading the metrics detects values that are not finite, so it comes before evaluation and saving.
        if self.finished or saving or due or step % settings.log_every == 0:
            job.advance(0, **self._log())
            self.finished |= between and self._ended()
        for callback in self.callbacks if self.finished else due:
            callback.after_step(self)
        if due:  # asking costs a message between processes
            self.finished |= between and self._ended()
        if saving or self.finished:
            self._save()
        if due or saving:
            self._clock = (step, time.monotonic())
        if stopping and not self.finished:
            raise TrainingInterrupted(f"stopped after step {step}; run the same command again to resume")

    def _ended(self) -> bool:
        return any([callback.ends_run() for callback in self.callbacks])  # no short-circuit: some communicate

    def _saving_is_due(self) -> bool:
        every = self.settings.checkpoint_every
        return self.step // every > self._saved // every

    def _agree_to_stop(self, stop: StopRequest) -> bool:
        if distributed.world_size() == 1:
            return stop.requested
        every = self.settings.log_every
        if self.step // every == self._asked // every:  # asking all processes costs a message
            return False
        self._asked = self.step
        return any(distributed.gather(stop.requested))

    def _log(self) -> dict[str, float]:
        """Write one line of metrics, the means since the last line, and return what the progress bar shows."""
        values = self.learner.metrics(self.step)
        since, then = self._clock
        now = time.monotonic()
        values["images_per_second"] = (self.step - since) * self.learner.samples_per_step / max(now - then, 1e-9)
        values["memory_gb"] = memory_gigabytes()[0]
        for callback in self.callbacks:
            callback.logged(self.step, values)
        self.metrics.log(self.step, values)
        self._clock = (self.step, now)
        return {name: values[name] for name in SHOWN if name in values}

    def _save(self) -> None:
        self._saved = self.step
        self.learner.count()
        with self.learner.run.cost.paused():
            if distributed.is_main():
                save_checkpoint(self.checkpoints, self._checkpoint(), self.settings.keep_checkpoints)
            distributed.wait_for_everyone()

    def _checkpoint(self) -> Checkpoint:
        tensors, values = self.learner.state()
        for callback in self.callbacks:
            if callback.name:
                values[callback.name] = callback.state_dict()
                tensors |= {callback.name: held} if (held := callback.tensors()) else {}
        return Checkpoint(self.step, tensors, self.learner.recipe, values)

    def _restore(self, resume: str) -> int:
        """Load the checkpoint to resume from, if there is one, and return its step."""
        path = self._choose_checkpoint(resume)
        if path is None:
            return 0
        saved = load_checkpoint(path)
        check_same_recipe(saved.recipe, self.learner.recipe, path)
        if saved.step > self.settings.steps:
            raise UserError(f"{path} is beyond trainer.steps {self.settings.steps}; raise it, or use --resume never")
        self.learner.load(saved)
        for callback in self.callbacks:
            if callback.name in saved.values:
                callback.load_state_dict(saved.values[callback.name], saved.tensors.get(callback.name, {}))
        if distributed.is_main():
            abandon_later(self.checkpoints, saved.step)
        note(f"resuming from {path}")
        if change := changed_schedule(saved.recipe, saved.step, self.settings):
            note(change)
        self._saved = saved.step
        return saved.step

    def _choose_checkpoint(self, resume: str) -> Path | None:
        if resume == "never":
            if distributed.is_main():
                set_aside(self.checkpoints)
            distributed.wait_for_everyone()
            return None
        if resume == "auto":
            found = list_checkpoints(self.checkpoints)
            return found[-1] if found else None
        return Path(resume)
