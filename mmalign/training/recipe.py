"""The recipe of a run: its method, the method's defaults, and the values that must be equal to resume it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from mmalign.config.renamed import current_options
from mmalign.config.run import RunConfig
from mmalign.config.yaml import flatten
from mmalign.core.progress import note
from mmalign.data.encoded.cache import CachedSides
from mmalign.data.labels import LabelTable
from mmalign.data.pairs import PairTable
from mmalign.methods.base import Method

_FREE_OF_DATA = ("pairs", "labels", "prompts", "cache", "on_bad")


def build_method(config: RunConfig) -> Method[Any]:
    """Return the method that a configuration names."""
    from mmalign.methods import methods

    chosen = methods.get(config.method_name)
    method: Method[Any] = chosen(chosen.Config(**current_options(chosen.Config, config.method_options)))
    return method


def complete(config: RunConfig) -> RunConfig:
    """Return the configuration with the method's own defaults filled in, as `load_config` already does."""
    options = build_method(config).config.model_dump(mode="json")
    return config.model_copy(update={"method": {"name": config.method_name, **options}})


def data_id(table: PairTable | LabelTable, samples: CachedSides) -> str:
    """Return 32 hex digits that identify the data in their order: ids, texts, content of images, margin or label."""
    digest = hashlib.blake2b(digest_size=16)
    for index, (row, name) in enumerate(zip(samples.kept.tolist(), samples.ids, strict=True)):
        digest.update(repr((name, *table.texts(row), *samples.facts(index))).encode())
    return digest.hexdigest()


def recipe(config: RunConfig, data: str, model: str, world_size: int) -> dict[str, Any]:
    """Return the values that must be equal to resume a run, flat: everything that its numbers depend on.

    `data` and `model` identify the content of the pairs and of the model that training started from. Settings that
    only change how a run is logged, stored or computed are left out. How a step's samples are split into micro-batches
    may change, their number may not.
    """
    values = config.model_dump(
        mode="json", exclude={"output", "evaluate", "monitors", "attention", "rounds", "allow_distilled"}
    )
    values["data"] = {k: v for k, v in values["data"].items() if k not in _FREE_OF_DATA}
    values["method"].pop("two_pass", None)
    trainer = values["trainer"]
    for key in ("budget", "log_every", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing"):
        del trainer[key]
    for key in ("trackers", "tracker_project", "tracker_run"):  # the last two stand beside trackers alone
        trainer.pop(key, None)
    per_step = trainer.pop("batch_size") * trainer.pop("gradient_accumulation") * world_size
    return {"data.content": data, "model.content": model, "trainer: samples per step": per_step, **flatten(values)}


def set_aside(folder: Path) -> None:
    """Move an earlier run's files to a folder beside that of the new one, replacing files kept before."""
    if folder.is_dir():
        previous = folder.with_name(folder.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.replace(previous)
        note(f"what an earlier run left is kept in {previous}")
