"""Metrics of a run: always as JSON lines in <output>/metrics.jsonl, and TensorBoard, W&B or trackio if asked for."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically

FILE = "metrics.jsonl"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed: accelerate would leave it out without a word.

    Raises:
        UserError: names the package to install.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES.get(name, (name,))):
            raise UserError(
                f"trainer.trackers asks for {name}, which is not installed: pip install {name}, or leave it out "
                f"(the same numbers are always in {FILE})"
            )


class MetricBuffer:
    """Metrics of the steps since the last line; tensors stay on their device until all are read in one transfer."""

    def __init__(self) -> None:
        """Start empty."""
        self._entries: list[tuple[int, str, Tensor | float]] = []

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Note the values of a step; nothing is computed, and nothing waits for the device."""
        for name, value in values.items():
            self._entries.append((step, name, value.detach() if isinstance(value, Tensor) else value))

    def read(self, device: torch.device | str) -> list[tuple[int, str, float]]:
        """Return (step, name, value) of everything added, in order, and forget it."""
        held = [value.to(device, torch.float32) for _, _, value in self._entries if isinstance(value, Tensor)]
        numbers = iter(torch.stack(held).tolist() if held else [])
        read = [(step, name, next(numbers) if isinstance(v, Tensor) else float(v)) for step, name, v in self._entries]
        self._entries = []
        return read


class Metrics:
    """Writes each line of metrics once, on the main process, to the file and to the trackers of an accelerator."""

    def __init__(self, output: Path, config: BaseModel, accelerator: Any, start_step: int) -> None:
        """Open the trackers and the file, dropping what was logged beyond `start_step` (all, if it is 0)."""
        self.path = output / FILE
        self.accelerator = accelerator
        if accelerator.is_main_process:
            _truncate(self.path, start_step)
        details = {"config": config.model_dump(mode="json")}
        options = {"wandb": {**details, "name": output.name, "dir": str(output)}, "trackio": details}
        accelerator.init_trackers("mmalign", init_kwargs=options)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one line `{"step": ..., name: value}`; a value that is not finite becomes null, as JSON requires."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def log_image(self, step: int, name: str, picture: Any) -> None:
        """Send a PIL image to the trackers that take images; on disk it is the caller's."""
        import numpy

        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: numpy.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [picture]}, step=step)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, oldest first; a last line cut off by a crash is left out."""
    path = output / FILE
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _truncate(path: Path, last_step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= last_step] if last_step else []
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
