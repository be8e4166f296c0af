"""Callbacks of a run: evaluation, monitors, early stopping, the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.config.sections import BudgetConfig
from mmalign.core import distributed
from mmalign.core.progress import note
from mmalign.methods.run import BaseRun
from mmalign.training.evaluation import Evaluator
from mmalign.training.image_evaluation import save_grid
from mmalign.training.loop import Callback, Loop
from mmalign.training.monitors import Monitors


class Evaluation(Callback):
    """Evaluates every `every` steps, before the first and after the last, on the main process while others wait."""

    def __init__(
        self,
        evaluator: Evaluator,
        averaged: Callable[[], AbstractContextManager[None]],
        listeners: Sequence[Callback] = (),
    ) -> None:
        """In the context of `averaged` the network holds the weights to evaluate; `listeners` receive the scores."""
        self.evaluator, self.averaged, self.listeners = evaluator, averaged, list(listeners)

    def due(self, step: int) -> bool:
        """Tell whether the step is a multiple of `evaluate.every`."""
        return step % self.evaluator.config.every == 0

    def begin(self, loop: Loop) -> None:
        """Evaluate before the first update."""
        if loop.step == 0:
            self.after_step(loop)

    def after_step(self, loop: Loop) -> None:
        """Evaluate, log, and pass the scores to the listeners."""
        step, learner = loop.step, loop.learner
        totals, scores, spreads = learner.count(), dict[str, float](), dict[str, float]()
        with learner.run.cost.paused(), self.averaged():
            if distributed.is_main():
                scores, spreads, picture = self.evaluator.evaluate(learner.run)
                if picture is not None:
                    save_grid(picture, loop.output, step)
                    loop.metrics.log_image(step, "evaluation", picture)
                loop.metrics.log(step, scores | totals)
                note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            scores, spreads = distributed.broadcast((scores, spreads))
            for listener in self.listeners:
                listener.evaluated(step, scores, spreads)


class Watch(Callback):
    """Passes metrics, sampled images and evaluations to the monitors, and reports their alarms."""

    name = "monitors"

    def __init__(self, monitors: Monitors, run: BaseRun[Any]) -> None:
        """`run.shown` holds the images that the method sampled last; `run.viewers` get all of them."""
        self.monitors, self.run, self._stopped = monitors, run, False
        run.viewers.append(monitors.sampled)

    def logged(self, step: int, values: dict[str, float]) -> None:
        """Measure images that were sampled since the last line, once, and read the metrics."""
        if self.run.shown is not None:
            values |= self.monitors.images(step, *self.run.shown)
            self.run.shown = None  # its memory back
        self.monitors.metrics(step, {"kl": values.get("distance", math.nan), **values})
        self._collect()

    def evaluated(self, step: int, scores: Mapping[str, float], spreads: Mapping[str, float]) -> None:
        """Compare the held-out rewards with the training reward."""
        self.monitors.evaluation(step, scores, spreads)
        self._collect()

    def ends_run(self) -> bool:
        """Tell whether an alarm ends the run, which takes `monitors.action` stop."""
        return self._stopped

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the monitors."""
        return self.monitors.state_dict()

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the state of the monitors."""
        self.monitors.load_state_dict(state)

    def _collect(self) -> None:
        new = self.monitors.alarms()
        for alarm in new:
            note(f"warning: {alarm.sentence}")
        stop = any(alarm.stop for alarm in new)
        if self.monitors.config.action == "stop":
            stop = distributed.broadcast(stop)  # each process sampled its own images
        if stop:
            note("monitors: stopping the run (monitors.action is stop); run the same command again to resume")
        self._stopped |= stop


class EarlyStopping(Callback):
    """Keeps the weights with the best score on held-out prompts, and ends a run whose evaluations no longer improve.

    The run ends after `patience` evaluations in a row that were not better. Costs one copy of the trainable
    parameters.
    """

    name = "best"

    def __init__(self, parameters: dict[str, nn.Parameter], reward: str, patience: int, higher: bool = True) -> None:
        """Watch `reward`, of which more is better unless `higher` is False."""
        self.parameters, self.reward, self.patience = parameters, reward, patience
        self.sign = 1.0 if higher else -1.0
        self.step, self.value, self.misses = -1, -float("inf"), 0
        self.weights: dict[str, Tensor] = {}

    def ends_run(self) -> bool:
        """Tell whether enough evaluations in a row were no better than the best."""
        return self.misses >= self.patience

    @torch.no_grad()
    def evaluated(self, step: int, scores: Mapping[str, float], spreads: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far."""
        value = self.sign * scores[f"evaluation/{self.reward}"]
        if value > self.value:
            self.step, self.value, self.misses = step, value, 0
            self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            return
        self.misses += 1
        if self.ends_run():
            note(
                f"step {step}: {self.reward} has not improved on {self.sign * self.value:.4f} (step {self.step}) "
                f"for {self.misses} evaluations; stopping, with the weights of step {self.step}"
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the best weights into the model inside the context, and the present ones back afterwards."""
        present = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.weights[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = present[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the score and step of the best weights."""
        return {"reward": self.reward, "step": self.step, "value": self.value, "misses": self.misses}

    def tensors(self) -> dict[str, Tensor]:
        """Return the best weights."""
        return self.weights

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore from a checkpoint, if it watched the same reward."""
        if state.get("reward") != self.reward:
            return
        self.step, self.value, self.misses = state["step"], state["value"], state["misses"]
        self.weights = {name: tensor.to(self.parameters[name].device) for name, tensor in tensors.items()}


class Budget(Callback):
    """Ends a run whose budget is used up: images seen, reward calls or seconds."""

    def __init__(self, budget: BudgetConfig, count: Callable[[], dict[str, float]]) -> None:
        """`count` returns the use of all processes so far."""
        ((unit, self.allowed),) = budget.model_dump(exclude_none=True).items()
        self.key, self.count = "images_seen" if unit == "images" else unit, count

    def ends_run(self) -> bool:
        """Tell whether the budget is used up."""
        return self.count()[self.key] >= self.allowed
