"""Metrics of a run: always as JSON lines in <output>/metrics.jsonl, and in the trackers that `trainer.trackers` names.

A run that resumes from a checkpoint resumes the same run of its trackers (TensorBoard, W&B and trackio); one that
starts from the beginning starts a new one. The identifiers of trackers' runs are kept in <output>/tracking.json.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config.run import RunConfig, dump_config
from mmalign.config.yaml import flatten
from mmalign.core.errors import UserError
from mmalign.core.files import is_file, write_atomically
from mmalign.core.progress import note

FILE = "metrics.jsonl"
IDENTITY_FILE = "tracking.json"
_TAKE_PICTURES = ("wandb", "swanlab")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed: accelerate would leave it out silently.

    Raises:
        UserError: names the package to install.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name in LoggerType and name not in available:
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
        """Return (step, name, value) of everything added, in order, and clear it."""
        held = [value.to(device, torch.float32) for _, _, value in self._entries if isinstance(value, Tensor)]
        numbers = iter(torch.stack(held).tolist() if held else [])
        read = [(step, name, next(numbers) if isinstance(v, Tensor) else float(v)) for step, name, v in self._entries]
        self._entries = []
        return read


class Metrics:
    """Writes each line of metrics once, on the main process, to the file and to the trackers of an accelerator."""

    def __init__(self, output: Path, config: RunConfig, accelerator: Any, start_step: int) -> None:
        """Open the trackers and the file, dropping lines beyond `start_step` (all, if it is 0)."""
        self.path = output / FILE
        self.accelerator = accelerator
        if accelerator.is_main_process:
            _truncate(self.path, start_step, config.trainer.log_every)
            _open_trackers(output, config, accelerator, start_step)

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
            elif tracker.name in _TAKE_PICTURES:
                tracker.log_images({name: [picture]}, step=step)


def _open_trackers(output: Path, config: RunConfig, accelerator: Any, start_step: int) -> None:
    """Start every tracker with the config, in its earlier run if this run resumes from a checkpoint."""
    if not config.trainer.trackers:
        return
    values = config.model_dump(mode="json")
    name = config.trainer.tracker_run or output.resolve().name
    identity = _identity(output / IDENTITY_FILE, name, new=start_step == 0)
    accelerator.init_trackers(
        config.trainer.tracker_project,
        init_kwargs={
            # Lines of an interrupted run beyond its checkpoint are hidden, since they are logged again.
            "tensorboard": {"purge_step": start_step + (start_step > 0)},
            "wandb": {"config": values, "name": name, "id": identity["wandb"], "resume": "allow", "dir": str(output)},
            "trackio": {"config": values, "name": identity["trackio"], "resume": "allow", "embed": False},
        },
    )
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            text = "\n".join(f"    {line}" for line in dump_config(config).splitlines())  # Markdown's code
            tracker.tracker.add_text("config", text, global_step=start_step)
        elif tracker.name not in ("wandb", "trackio"):
            tracker.store_init_configuration({key: _plain(value) for key, value in flatten(values).items()})


def _identity(path: Path, name: str, *, new: bool) -> dict[str, str]:
    """Return the identifier of the run in each tracker, kept between calls unless it is a `new` one."""
    if not new and path.is_file():
        kept: dict[str, str] = json.loads(path.read_text())
        return kept
    key = secrets.token_hex(4)
    # trackio identifies a run by its name alone, and two outputs may have the same name.
    identity = {"wandb": key, "trackio": f"{name}-{key}"}
    write_atomically(path, json.dumps(identity, indent=2) + "\n")
    return identity


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, oldest first; damaged lines are left out."""
    return _read(output / FILE)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics, and the number of those that are damaged."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if is_file(path) else []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines, len(texts) - len(lines)


def _truncate(path: Path, last_step: int, log_every: int) -> None:
    """Keep the lines up to a step; say it where lines that a run of so many steps has written are not there."""
    lines, damaged = _read(path) if last_step else ([], 0)
    kept = [line for line in lines if line["step"] <= last_step]
    if damaged:
        note(f"{path}: {damaged} damaged lines are left out")
    if last_step - max((line["step"] for line in kept), default=0) >= log_every:
        there = f"ends at step {kept[-1]['step']}" if kept else "holds no metrics" if is_file(path) else "is missing"
        note(f"{path} {there}, and this run goes on from step {last_step}: the metrics between are lost")
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
