"""How a run finds its processes and its precision: one `accelerate.Accelerator`, made anew for each run."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.precision import ACCELERATE_NAMES
from mmalign.training.tracking import check_trackers

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from mmalign.training.latent_reward.config import LatentRewardConfig


def make_accelerator(config: RunConfig | LatentRewardConfig, *, watched: bool = True) -> Any:
    """Return the accelerator of this run; several runs may follow each other in one process (the demo's do).

    It is made from the config alone: what `accelerate launch` left in the environment neither scales the gradients nor
    changes the precision.

    Raises:
        UserError: accelerate is configured for sharding, which this loop does not support, or its environment asks for
            another accumulation or precision than the config.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

    check_trackers(config.trainer.trackers)
    _check_environment(config)
    # Accelerate keeps the first run's precision for the life of the process unless it is reset.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=ACCELERATE_NAMES[config.trainer.precision] if watched else "no",
        log_with=list(config.trainer.trackers) or None if watched else None,
        project_dir=config.output,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # our loop divides the loss itself
        # The others wait while the first rank encodes, evaluates and exports, which may take longer than ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
    )
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this trainer keeps a whole copy on "
            "every GPU: run `accelerate launch --multi_gpu` instead, with adapter.kind lora to save memory"
        )
    return accelerator


def _check_environment(config: RunConfig | LatentRewardConfig) -> None:
    """Refuse what `accelerate launch` was told and the config contradicts; 1 and "no" are what it sets untold."""
    trainer = config.trainer
    for variable, key, untold, ours in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation", "1", str(trainer.gradient_accumulation)),
        ("ACCELERATE_MIXED_PRECISION", "precision", "no", ACCELERATE_NAMES[trainer.precision]),
    ):
        theirs = os.environ.get(variable, untold)
        if theirs not in (untold, ours):
            raise UserError(
                f"the environment has {variable}={theirs} and the config trainer.{key}: {getattr(trainer, key)}; "
                f"only the config counts: set trainer.{key}, or unset {variable} (`accelerate launch` sets it)"
            )
