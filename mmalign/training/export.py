"""Write a finished run's model, and load it as a user would to check that it is the trained one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.core.precision import autocast, round_frozen
from mmalign.core.progress import note
from mmalign.training.checkpoint import as_disk_full
from mmalign.training.model_card import write_card
from mmalign.training.models import base_model_name
from mmalign.training.prepare import Prepared
from mmalign.training.tasks import task_of
from mmalign.training.tasks.base import Probe

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def export(
    config: RunConfig, parts: Prepared, weights: AbstractContextManager[None], facts: dict[str, Any]
) -> tuple[Probe, Tensor]:
    """Write the model, in the context `weights`, and its card; return an input and the model's output for it."""
    run, output = parts.run, Path(config.output)
    with weights:
        probe = parts.task.probe(run, parts.sampler)
        with run.autocast():
            expected = probe.predict(run.model)
        try:
            write_weights(run.model, config, output, base_model_name(config))
        except Exception as error:
            raise as_disk_full(error, f"writing the model to {output}") from error
    write_card(config, output, {parts.method.needs.source: len(parts.sampler.samples), **facts})
    return probe, expected


def verify(config: RunConfig, probe: Probe, expected: Tensor, device: torch.device) -> None:
    """Load the export as a user would and check that it is the trained model."""

    def load(path: str) -> Any:
        model = task_of(config).load_model(config, path, device)
        round_frozen(model.network, config.trainer.precision)
        return model

    with autocast(config.trainer.precision, device):
        check_load_back(Path(config.output), load, probe, expected)
    note(f"the model is in {config.output}")


class ExportError(RuntimeError):
    """The exported weights, loaded again, give another output than the trained model."""


def write_weights(model: Any, config: RunConfig, output: Path, base_model: str) -> None:
    """Write the present weights: an adapter for LoRA, else a diffusers or transformers directory."""
    output.mkdir(parents=True, exist_ok=True)
    if config.adapter.kind == "lora":
        model.save_lora(output, base_model=base_model)
    else:
        model.save(output)


def check_load_back(
    output: Path,
    load: Callable[[str], Any],
    probe: Probe,
    expected: Tensor,
    tolerance: float = 1e-4,
) -> None:
    """Load the export as a user would and compare one prediction with that of the trained model.

    Raises:
        ExportError: they differ by more than the tolerance times the largest value (at least 1).
    """
    found = probe.predict(load(str(output)))
    difference = (found - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ExportError(
            f"{output} was written, but read again it predicts something else (largest difference {difference:.2g}, "
            f"allowed {allowed:.2g}); the last checkpoint in {output / 'checkpoints'} is sound, please report this"
        )
