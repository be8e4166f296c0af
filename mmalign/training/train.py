"""Train by a configuration: one training, rounds, or stages; the loop is in `mmalign.training.loop`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.core.errors import UserError
from mmalign.training.accelerator import make_accelerator
from mmalign.training.models import make_trainable
from mmalign.training.plan import Plan, make_plan
from mmalign.training.prepare import open_inputs
from mmalign.training.recipe import build_method, complete
from mmalign.training.rounds import train_in_rounds
from mmalign.training.single import train_one
from mmalign.training.stages import train_in_stages

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def train(config: RunConfig, *, resume: str = "auto") -> Path:
    """Train as the configuration says and return the directory of the exported model (`config.output`).

    Args:
        config: see `mmalign.config.run`.
        resume: "auto" resumes from the last checkpoint in the output if there is one, "never" starts again (keeping
            the earlier checkpoints aside), a path names the checkpoint to resume from.

    Raises:
        UserError: the configuration cannot work, or differs from that of the checkpoint.
        TrainingDiverged: the loss is not finite. DiskFull: no room to save. ExportError: the export does not load.
        TrainingInterrupted: Ctrl-C; the run can be resumed from the checkpoint it saved.
    """
    config = complete(config)
    if config.rounds is not None:
        return train_in_rounds(config, resume)
    if len(build_method(config).stages) > 1:
        return train_in_stages(config, resume)
    return train_one(config, resume)


def plan(config: RunConfig) -> Plan:
    """Check everything, read the data's index and the model, and return the plan of `train`; nothing is written.

    Raises:
        UserError: the configuration cannot work, or trains in rounds, whose data do not exist yet.
    """
    if config.rounds is not None:
        raise UserError("rounds sample their data during training, so there is no plan before they are trained")
    accelerator = make_accelerator(config, watched=False)
    method, source, generator = open_inputs(config, accelerator)
    make_trainable(generator, config)
    return make_plan(config, method, len(source), generator, accelerator.num_processes)
