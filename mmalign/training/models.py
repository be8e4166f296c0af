"""The model of a run, a generator or a vision-language model: opened, identified, made trainable, merged, named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.files import expand
from mmalign.core.precision import round_frozen
from mmalign.core.resources import find, resolve_model, shipped
from mmalign.core.seeds import derive_seed
from mmalign.training.tasks import task_of

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def load_model(config: RunConfig, device: Any) -> Any:
    """Return the model that training starts from.

    Raises:
        UserError: it is itself an adapter.
    """
    model = task_of(config).load_model(config, resolve_model(config.model), device)
    if model.has_adapter:
        raise UserError(
            f"model {config.model} is an adapter on {model.name_or_path}; set model: {model.name_or_path} and "
            f"adapter.start: {config.model}, or merge it first: `mmalign merge {config.model} --out DIR`, then model: "
            "DIR"
        )
    return model


def make_trainable(model: Any, config: RunConfig) -> None:
    """Add the adapter, or unfreeze every weight; frozen layers are then kept in the compute precision."""
    trainer, adapter = config.trainer, config.adapter
    if adapter.kind == "lora" and adapter.start is not None:
        model.load_adapter(find(adapter.start))
        for parameter in model.trainable_parameters():
            parameter.data = parameter.data.float()
    elif adapter.kind == "lora":
        seed = derive_seed(trainer.seed, "adapter")
        init = {} if adapter.init is None else {"init": adapter.init}
        model.add_adapter(adapter.rank, alpha=adapter.alpha, target_modules=adapter.targets, seed=seed, **init)
    else:
        model.network.requires_grad_(True)
    round_frozen(model.network, trainer.precision)
    if trainer.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    task_of(config).set_mode(model)


def start_id(config: RunConfig) -> str:
    """Return what tells one adapter to start from from another, by its content; empty for a fresh one."""
    from pipelines.components import file_digest
    from pipelines.lora_files import adapter_file

    start = config.adapter.start
    return "" if start is None else f"+{file_digest(adapter_file(find(start)))[:32]}"


def check_export(model: Any, config: RunConfig) -> None:
    """Write the fresh adapter with made-up weights, read it back and compare: an export must not fail after training.

    Raises:
        PipelineError: the file would give another model, or cannot be read.
    """
    if config.adapter.kind == "lora":
        model.check_lora_export(Path(config.output))


def base_model_name(config: RunConfig) -> str:
    """Return the name of an adapter's base: as given if it is the same anywhere, otherwise as an absolute path."""
    given = expand(config.model)
    ours = shipped(given)
    if not given.exists() or (ours is not None and ours.exists() and ours.samefile(given)):
        return config.model
    return str(given.resolve())


def whole_model(config: RunConfig, trained: Path, merged: Path) -> Path:
    """Return a model to start from: the export itself, or for an adapter, its base with the adapter merged in."""
    if config.adapter.kind == "full":
        return trained
    plain = config.model_copy(update={"attention": "sdpa"})
    save_whole(task_of(config).load_model(plain, str(trained), "cpu"), trained, merged)
    return merged


def save_whole(model: Any, trained: Path, folder: Path) -> None:
    """Write a model with its adapter merged in, and the config that `trained` was trained by, in place of `folder`."""
    folder = folder.resolve()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save(unfinished)
        config = trained / "config.yaml"
        if config.is_file():
            shutil.copyfile(config, unfinished / config.name)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_adapter(model: str, what: str, fix: str) -> None:
    """Refuse to scale a missing adapter: `what` names the option, `fix` the way to give an adapter.

    Raises:
        UserError: `model` does not exist, or is a whole model.
    """
    from pipelines.load import is_adapter

    if not is_adapter(resolve_model(model)):
        raise UserError(
            f"{what} needs an adapter, and {model} is a whole model without one; {fix}, or leave the scale out"
        )
