"""From a configuration to the parts of a run, in the order that spares memory: check, encode, free encoders, adapt.

All predictable errors are raised here, the cheap checks before the first weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.config.run import RunConfig
from mmalign.config.sections import RewardConfig
from mmalign.core.errors import UserError
from mmalign.core.files import check_output, expand
from mmalign.core.precision import autocast, check_precision
from mmalign.core.resources import find, resolve_model
from mmalign.data.sampler import BatchSampler
from mmalign.methods.base import Method
from mmalign.methods.run import BaseRun
from mmalign.scoring.choice import WeightedReward
from mmalign.training.evaluation import Evaluator
from mmalign.training.models import check_export, load_model, make_trainable, start_id
from mmalign.training.output import EXPORT_FILES
from mmalign.training.plan import check_enough, check_files
from mmalign.training.recipe import build_method
from mmalign.training.references import check_reference, make_reference, reference_id
from mmalign.training.tasks import Task, task_of
from mmalign.training.tasks.base import Source


@dataclass
class Prepared:
    """The parts of a run, ready for the loop."""

    task: Task[Any]
    method: Method[Any]
    run: BaseRun[Any]
    sampler: BatchSampler
    evaluator: Evaluator | None
    data_id: str
    """Identifies the training data: ids, prompts and images on either side, not the path."""
    model_id: str
    """Identifies the model that training starts from by its content."""


def check(config: RunConfig, method: Method[Any], device: Any) -> None:
    """Refuse settings that cannot work, before any weight is read.

    Raises:
        UserError: names the key and the fix.
    """
    if config.trainer.steps % method.updates_per_round:
        raise UserError(
            f"trainer.steps {config.trainer.steps} must be a multiple of the {method.updates_per_round} steps of a "
            "round (method.updates_per_round x mini_batches): a round of samples is used up before the run ends"
        )
    output = Path(config.output)
    check_output(output, "output")
    if config.data.cache:
        check_output(expand(config.data.cache), "data.cache")
    check_precision(config.trainer.precision, device)
    resolve_model(config.model)
    if config.adapter.start is not None:
        find(config.adapter.start)
    check_reference(config, method)
    task_of(config).check(config)
    other = EXPORT_FILES[config.modality, "full" if config.adapter.kind == "lora" else "lora"]
    if (output / other).exists():
        raise UserError(
            f"output {output} holds {other} of a run with another adapter.kind; choose another output or remove it"
        )


def open_inputs(config: RunConfig, accelerator: Any) -> tuple[Method[Any], Source, Any]:
    """Check the recipe, cheapest things first, and return method, data and model."""
    method, task = build_method(config), task_of(config)
    check(config, method, accelerator.device)
    source = task.open_source(config, method)
    method.check_data(source)
    check_enough(len(source), config, accelerator.num_processes, method.needs.source)
    check_files(source, str(config.data.pairs or config.data.labels))
    model = load_model(config, accelerator.device)
    task.check_model(method, model)
    return method, source, model


def prepare(config: RunConfig, accelerator: Any) -> Prepared:
    """Return the parts of the run; prints counts of the data."""
    task = task_of(config)
    method, source, model = open_inputs(config, accelerator)
    # Now, since encoding may take hours in which the files can change.
    model_id = task.model_id(model) + start_id(config) + reference_id(config)
    samples, content = task.encode(source, model, config, accelerator, model_id)
    evaluator = task.evaluator(config, model)
    kept = task.free_encoders(model, method)
    rewards = load_rewards(config, accelerator.device)
    make_trainable(model, config)
    if accelerator.is_main_process:
        check_export(model, config)
    cast = partial(autocast, config.trainer.precision, accelerator.device)
    reference = None
    if method.keeps_reference:
        reference = make_reference(config, model, autocast=cast, device=accelerator.device)
    run = task.make_run(
        model,
        seed=config.trainer.seed,
        reference=reference,
        rewards=rewards,
        autocast=cast,
        kept=kept,
        samples=samples,
        two_pass=in_two_passes(method, model),
    )
    for module in task.counted(model, reference):
        run.cost.watch(module)
    with accelerator.main_process_first():
        method.begin(run)
    sampler = BatchSampler(
        samples,
        batch_size=config.trainer.batch_size,
        accumulation=config.trainer.gradient_accumulation,
        seed=config.trainer.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    return Prepared(task, method, run, sampler, evaluator, content, model_id)


def in_two_passes(method: Method[Any], model: Any) -> bool:
    """Tell whether a method predicts sample by sample: as its option `two_pass` says, by default for videos."""
    chosen: bool | None = getattr(method.config, "two_pass", False)
    return getattr(model, "modality", "image") == "video" if chosen is None else chosen


def load_rewards(config: RunConfig, device: Any) -> list[WeightedReward]:
    """Load the rewards that the method learns from."""
    from rewards import load_reward
    from rewards.combining.on_frames import on_frames

    def load(one: RewardConfig) -> Any:
        return on_frames(load_reward(one.name, **{"device": device, **one.options}), one.frames)

    return [WeightedReward(one.name, one.weight, load(one)) for one in config.rewards]
