"""One training, whole: prepare, run the loop, export, and read the export back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.cost import COUNTERS
from mmalign.core.lock import locked_output
from mmalign.core.progress import note
from mmalign.training.accelerator import make_accelerator
from mmalign.training.callbacks import Budget, EarlyStopping, Evaluation, Watch
from mmalign.training.export import export, verify
from mmalign.training.loop import Callback, Loop
from mmalign.training.method_learner import MethodLearner
from mmalign.training.monitors import Monitors
from mmalign.training.plan import make_plan
from mmalign.training.prepare import Prepared, prepare

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def train_one(config: RunConfig, resume: str = "auto") -> Path:
    """Do one training and return the folder of the export; see `mmalign.training.train.train`.

    `config` is complete (`mmalign.training.recipe.complete`) and has neither rounds nor stages.
    """
    accelerator = make_accelerator(config)
    held = locked_output(Path(config.output), "output") if accelerator.is_main_process else nullcontext()
    with held:
        return _train_alone(config, resume, accelerator)


def _train_alone(config: RunConfig, resume: str, accelerator: Any) -> Path:
    parts = prepare(config, accelerator)
    learner = MethodLearner(config, parts, accelerator)
    early = make_early_stopping(config, parts, learner)
    loop = Loop(learner, config, make_callbacks(config, parts, learner, early))
    note(str(make_plan(config, parts.method, len(parts.sampler.samples), parts.run.model, parts.sampler.world_size)))
    loop.run(resume)
    proof = None
    if accelerator.is_main_process:
        weights = early.applied() if early is not None and early.weights else learner.averaged()
        proof = export(config, parts, weights, training_facts(learner, early))
    # Two whole models need not fit: the trained one, with its optimiser, goes before the exported one is read.
    del parts, learner, early, loop
    accelerator.free_memory()
    if proof is not None:
        verify(config, *proof, accelerator.device)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the group of processes, after which nobody can wait for anybody
    return Path(config.output)


def make_early_stopping(config: RunConfig, parts: Prepared, learner: MethodLearner) -> EarlyStopping | None:
    """Return the early stopping, if configured."""
    stop = config.evaluate.early_stop if config.evaluate else None
    if stop is None or parts.evaluator is None:
        return None
    return EarlyStopping(learner.parameters, stop.reward, stop.patience, parts.evaluator.higher_is_better(stop.reward))


def make_callbacks(
    config: RunConfig, parts: Prepared, learner: MethodLearner, early: EarlyStopping | None
) -> list[Callback]:
    """Return the callbacks of a run."""
    listeners: list[Callback] = []
    if parts.method.needs.source == "prompts":
        # A reward with a negative weight is meant to fall.
        lower = parts.evaluator.lower_is_better() if parts.evaluator else set()
        lower = lower ^ {one.name for one in config.rewards if one.weight < 0}
        monitors = Monitors(config.monitors, [one.name for one in config.rewards], lower_is_better=lower)
        listeners.append(Watch(monitors, parts.run))
    if early is not None:
        listeners.append(early)
    callbacks = list(listeners)
    if parts.evaluator is not None:
        callbacks.append(Evaluation(parts.evaluator, learner.averaged, listeners))
    if config.trainer.budget is not None:
        callbacks.append(Budget(config.trainer.budget, learner.count))
    return callbacks


def training_facts(learner: MethodLearner, early: EarlyStopping | None) -> dict[str, Any]:
    """Return the facts of the training for the model card."""
    facts: dict[str, Any] = {"steps": learner.run.step}
    facts |= {name.replace("_", " "): f"{int(learner.totals[name]):,}" for name in COUNTERS if learner.totals[name]}
    if early is not None and early.weights:
        facts["exported weights"] = f"step {early.step}, the best by {early.reward} on held-out prompts"
    return facts
