"""Trainings that follow one another (rounds or stages): their limits, and skipping finished ones."""

from __future__ import annotations

import os
from pathlib import Path

from mmalign.config.run import RunConfig, load_config
from mmalign.core.errors import UserError
from mmalign.core.progress import note
from mmalign.training.output import CONFIG_FILE, is_finished
from mmalign.training.single import train_one


def check_chain(resume: str, what: str, work: str) -> None:
    """Refuse options that several trainings, one after another, do not support; `what` names them, `work` their work
    in between.

    Raises:
        UserError: one checkpoint is named for all of them, or there are several processes.
    """
    if resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: with {what}, a checkpoint belongs to one of them; allowed: auto, never")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{what} {work} in one process; start them with `mmalign train`, without a launcher")


def train_once(one: RunConfig, resume: str) -> Path:
    """Do one of several trainings unless it is finished, and return the folder of the export."""
    output = Path(one.output)
    if resume == "auto" and is_finished(output) and _was_trained_by(one, output):
        note(f"trained already, in {output}")
        return output
    return train_one(one, resume)


def _was_trained_by(config: RunConfig, output: Path) -> bool:
    try:
        return load_config(output / CONFIG_FILE) == config
    except UserError:
        return False
