"""The systems that a comparison trains, one after the other; finished ones are used and interrupted ones resumed.

A training's folder is the `output` of its config. An output trained by the same resolved config is used as it is; one
trained by another config is refused, or set aside on request. Of the training seeds of a
comparison the config's own trains into `output`, every other one into `<output>-seed<k>` beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmalign.compare.systems.config import Replica, SystemConfig, SystemsConfig
from mmalign.compare.systems.facts import read_cost
from mmalign.config.run import RunConfig, load_config
from mmalign.config.sections import BudgetConfig
from mmalign.config.yaml import ConfigIssues, flatten
from mmalign.core.errors import UserError
from mmalign.core.progress import note, reset_peak_memory
from mmalign.core.resources import resolve_model
from mmalign.training import rounds, stages
from mmalign.training.output import CONFIG_FILE, has_export, is_finished
from mmalign.training.recipe import build_method, set_aside
from mmalign.training.tracking import read_metrics

State = Literal["absent", "unfinished", "finished", "different"]


@dataclass
class Training:
    """One training, the replicas that come from it (at several adapter scales, say), and the state of its folder.

    `differences` lists for state "different" the changes: "trainer.steps was 200, now 400".
    """

    config: RunConfig
    source: str
    systems: list[str]
    state: State = "absent"
    differences: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The output folder, absolute."""
        return Path(self.config.output).resolve()


def train_systems(config: SystemsConfig, *, train: bool = True, retrain: bool = False) -> dict[str, str]:
    """Train the missing systems, and return the model of every replica of a comparison, by its name.

    Args:
        train: False refuses to train: every training must be finished.
        retrain: set aside what was trained by a config that differs, and train it anew.

    Raises:
        UserError: a config is wrong, a folder holds another training, a training is missing that may not be done, or
        cannot work: all reported before the first training starts.
        TrainingDiverged, DiskFull, ExportError, TrainingInterrupted: see `mmalign.training.train.train`.
    """
    trainings = plan_trainings(config)
    faults = [fault for one in trainings if (fault := _refusal(one, train, retrain))]
    if faults:
        raise ConfigIssues(faults)
    _try_out([one for one in trainings if one.state != "finished"])
    for number, training in enumerate(trainings, start=1):
        _complete(training, f"{number}/{len(trainings)} {', '.join(training.systems)} ({training.source})")
    given = {system.name: system.model or system.made for system in config.systems}
    models = {name: model for name, model in given.items() if model is not None}
    return models | {name: training.config.output for training in trainings for name in training.systems}


def plan_trainings(config: SystemsConfig) -> list[Training]:
    """Read and check the config of every training, in the order of the systems, and inspect its folder.

    Raises:
        UserError: one line a fault, all of them.
    """
    trainings: dict[Path, Training] = {}
    faults: list[str] = []
    for replica in config.replicas:
        system = replica.system
        try:
            if system.made is not None:
                continue
            if system.train is not None:
                _add(trainings, replica, _read_run(replica, config.budget))
            elif Path(str(system.model)).resolve() not in trainings:
                resolve_model(str(system.model))
        except UserError as error:
            faults += [f"system '{system.name}': {line}" for line in str(error).splitlines()]
    faults += _nested([*trainings.values()], Path(config.output).resolve())
    if faults:
        raise ConfigIssues(faults)
    anew: set[Path] = set()
    for training in trainings.values():
        training.state, training.differences = _inspect(training.config)
        if training.state in ("finished", "unfinished") and Path(training.config.model).resolve() in anew:
            training.state, training.differences = "different", [f"model {training.config.model} will be retrained"]
        if training.state == "different":
            anew.add(training.folder)
    return list(trainings.values())


def training_overrides(system: SystemConfig, budget: BudgetConfig | None) -> list[str]:
    """Return the overrides for a system's config: its own, and the budget of the comparison."""
    if budget is None:
        return system.overrides
    return [*system.overrides, f"trainer.budget={json.dumps(budget.model_dump(exclude_none=True))}"]


def _read_run(replica: Replica, budget: BudgetConfig | None) -> RunConfig:
    """Read the training config of a replica: that of its system, with its own seed and output for further seeds."""
    system = replica.system
    run = load_config(str(system.train), training_overrides(system, budget))
    if replica.seed in (None, run.trainer.seed):
        return run
    trainer = run.trainer.model_copy(update={"seed": replica.seed})
    return run.model_copy(update={"trainer": trainer, "output": f"{run.output.rstrip('/')}-seed{replica.seed}"})


def _add(trainings: dict[Path, Training], replica: Replica, run: RunConfig) -> None:
    """Note the training of a replica, once if systems share it.

    Raises:
        UserError: the config does not fit the system, or another training uses its folder.
    """
    system = replica.system
    if system.adapter_scale != 1 and run.adapter.kind != "lora":
        raise UserError(
            f"adapter_scale {system.adapter_scale:g} needs an adapter, and {system.train} trains with adapter.kind "
            f"{run.adapter.kind}; add the override adapter.kind=lora, or leave the scale out"
        )
    new = Training(run, str(system.train), [replica.name])
    known = trainings.setdefault(new.folder, new)
    if known is new:
        return
    if known.config != run:
        raise UserError(
            f"trains into {run.output} as '{known.systems[0]}' does, by another config; add the override output=DIR "
            "to one of them"
        )
    known.systems.append(replica.name)


def _nested(trainings: list[Training], output: Path) -> list[str]:
    """Refuse folders inside a training's folder, which could be set aside with it."""
    others = {"the comparison": output, **{f"system '{one.systems[0]}'": one.folder for one in trainings}}
    return [
        f"{name}: its output {folder} lies in that of system '{training.systems[0]}'; choose one beside it"
        for training in trainings
        for name, folder in others.items()
        if training.folder in (folder, *folder.parents) and name != f"system '{training.systems[0]}'"
    ]


def _inspect(run: RunConfig) -> tuple[State, list[str]]:
    """Return the state of a training's folder and, if it holds another training, the differences."""
    output = Path(run.output)
    kept = output / CONFIG_FILE
    chain = rounds.FOLDER if run.rounds else stages.FOLDER if len(build_method(run).stages) > 1 else None
    if chain is not None:  # the model's folder holds the config of the last round or stage alone
        kept = output / chain / CONFIG_FILE
        if not kept.is_file() and (output / chain).is_dir():
            return "unfinished", []
    if not kept.is_file():
        return ("different", [f"{CONFIG_FILE} is missing beside its model"]) if has_export(output) else ("absent", [])
    try:
        found = _values(load_config(kept))
    except UserError as error:
        return "different", [str(error).splitlines()[0]]
    wanted = _values(run)
    differences = [
        (key, f"{key} was {found.get(key, '(absent)')}, now {wanted.get(key, '(absent)')}")
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]
    if differences and not (is_finished(output) and _within_budget(run, differences)):
        return "different", [text for _, text in differences]
    return ("finished" if is_finished(output) else "unfinished"), []


def _within_budget(run: RunConfig, differences: list[tuple[str, str]]) -> bool:
    """Tell whether a run with another budget, or none, did all its steps within the present budget."""
    if any(not key.startswith("trainer.budget") for key, _ in differences):
        return False
    metrics = read_metrics(Path(run.output))
    cost, done = read_cost(metrics), max((line.get("step", 0) for line in metrics), default=0)
    if not cost or done < run.trainer.steps:
        return False
    limit = {} if run.trainer.budget is None else run.trainer.budget.model_dump(exclude_none=True)
    return all(cost["images_seen" if unit == "images" else unit] <= allowed for unit, allowed in limit.items())


def _values(run: RunConfig) -> dict[str, object]:
    # One folder has several paths, and the place of a run does not change it.
    return flatten(run.model_dump(mode="json", exclude={"output"}))


def _refusal(training: Training, train: bool, retrain: bool) -> str | None:
    """Return the reason why a training cannot be done as requested, if there is one."""
    name, output = training.systems[0], training.config.output
    if training.state == "different" and not (train and retrain):
        return (
            f"system '{name}': {output} holds another training ({'; '.join(training.differences)}); add --retrain to "
            "set that one aside and train anew, restore the config, or give the system the override output=DIR"
        )
    if training.state != "finished" and not train:
        return f"system '{name}': {output} holds no finished training; leave out --no-train to train it"
    return None


def _try_out(trainings: list[Training]) -> None:
    """Open the inputs of all trainings before the first one starts, so that errors show before any training."""
    from mmalign.training.train import plan

    made_here = {training.folder for training in trainings}
    for training in trainings:
        if Path(training.config.model).resolve() in made_here or training.config.rounds is not None:
            continue  # the inputs of a training in rounds do not exist yet either
        try:
            plan(training.config)
        except UserError as error:
            raise UserError(f"system '{training.systems[0]}': {error}") from None


def _complete(training: Training, title: str) -> None:
    """Complete a training and print one line about it."""
    output = training.config.output
    if training.state == "finished":
        note(f"── {title}: trained already, in {output}")
        return
    note(f"── {title}: {'resumes' if training.state == 'unfinished' else 'trains'} into {output}")
    if training.state == "different":
        set_aside(Path(output))
    from mmalign.training.train import train

    reset_peak_memory()  # the memory peak of the training before must not count for this one
    train(training.config)
