"""How a run finds its processes and its precision: one `accelerate.Accelerator`, made anew for each run."""

from __future__ import annotations

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

    Raises:
        UserError: accelerate is configured for sharding, which this loop does not support.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    check_trackers(config.trainer.trackers)
    # Accelerate keeps the first run's precision for the life of the process unless it is reset.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=ACCELERATE_NAMES[config.trainer.precision] if watched else "no",
        log_with=list(config.trainer.trackers) or None if watched else None,
        project_dir=config.output,
        # The others wait while the first rank encodes, evaluates and exports, which may take longer than ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this trainer keeps a whole copy on "
            "every GPU: run `accelerate launch --multi_gpu` instead, with adapter.kind lora to save memory"
        )
    return accelerator
