"""Checkpoints: complete directories, from which a run resumes with bit-equal losses.

    <output>/checkpoints/step_00000400/
        weights.safetensors     trainable parameters        optimizer.safetensors   its moments
        ema.safetensors         their average, if kept      method.safetensors      tensors of the method, if any
        state.json              step, recipe, gradient scaler

It holds no state of a random generator: every draw of a run is a function of (seed, sample, epoch) or
(seed, step). A directory is written aside and renamed when complete, so an interrupted save leaves the last one
intact.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.config.checks import method_class
from mmalign.config.renamed import current_recipe, default_of
from mmalign.config.run import RunConfig
from mmalign.core.errors import UserError
from mmalign.core.progress import note
from mmalign.training.optim import learning_rate_factor, warmup_steps

FORMAT = 2
BEFORE: dict[str, Any] = {"method.advantage_epsilon": 1e-8, "method.advantage_floor": 0.0}
"""What runs did before a key existed, where it is not the key's default."""
WARMUP_IN_STEPS = "trainer.warmup, in steps"
"""What earlier versions kept of a constant schedule, in place of its warm-up and number of steps."""
_PARTIAL, _ABANDONED = ".partial", ".abandoned"


class DiskFull(RuntimeError):
    """A checkpoint or an export does not fit on the disk; nothing incomplete is left behind."""


@dataclass
class Checkpoint:
    """The state of a run after `step` updates: groups of named tensors, each a file, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    recipe: dict[str, Any]
    """Values that must be equal for the run to resume: flat "section.key" -> value."""
    values: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint into `folder` under its step and remove all but the newest `keep`; return its path.

    Raises:
        DiskFull: it does not fit.
    """
    from safetensors.torch import save_file

    final = folder / f"step_{checkpoint.step:08d}"
    aside = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _check_room(aside, sum(t.numel() * t.element_size() for g in checkpoint.tensors.values() for t in g.values()))
        for group, tensors in checkpoint.tensors.items():
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, aside / f"{group}.safetensors")
        document = {
            "format": FORMAT,
            "step": checkpoint.step,
            "groups": sorted(checkpoint.tensors),
            "recipe": checkpoint.recipe,
            "values": checkpoint.values,
        }
        (aside / "state.json").write_text(json.dumps(document, indent=1, default=str))
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise as_disk_full(error, f"saving a checkpoint under {folder}") from error
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for old in list_checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(path for path in found if (path / "state.json").is_file())


def abandon_later(folder: Path, step: int) -> None:
    """Rename the checkpoints beyond `step`, where the run resumes, so that they do not count as its newest ones."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            aside = path.with_name(path.name + _ABANDONED)
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            note(f"an earlier run went further; its checkpoint is kept as {aside}")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        UserError: the path is no checkpoint, is damaged, or was written in a format of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = path / "state.json"
    if not state.is_file():
        raise UserError(f"{path} is no checkpoint (it has no state.json); give one of <output>/checkpoints/step_*")
    try:
        document = json.loads(state.read_text())
        if document.get("format") != FORMAT:
            raise UserError(f"{path} has checkpoint format {document.get('format')}, this version reads {FORMAT}")
        tensors = {group: load_file(path / f"{group}.safetensors") for group in document["groups"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and the one before it is used") from error
    return Checkpoint(document["step"], tensors, document["recipe"], document["values"], path)


def check_same_recipe(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Refuse to resume a run with another recipe or other data, which would mix two runs.

    Keys that were renamed since the checkpoint was saved are compared under their new names, and a key that did not
    exist then counts as its default. The number of steps may change: see `changed_schedule`.

    Raises:
        UserError: names every key that differs, with both values.
    """
    method = method_class({"name": saved.get("method.name")})[0]
    options = method.Config if method else None
    saved = current_recipe(saved, RunConfig, options)
    new = {key: default_of(key, RunConfig, options) for key in current.keys() - saved.keys()}
    new |= {key: value for key, value in BEFORE.items() if key in new}
    saved |= json.loads(json.dumps({key: value for key, value in new.items() if value is not ...}, default=str))
    current = json.loads(json.dumps(current, default=str))
    if WARMUP_IN_STEPS in saved:
        current[WARMUP_IN_STEPS] = warmup_steps(current.pop("trainer.warmup"), current["trainer.steps"])
        saved.pop("trainer.warmup", None)
    for one in (saved, current):
        one.pop("trainer.steps", None)
    missing = object()
    different = [
        f"{key} was {_show(saved.get(key, '(absent)'))}, now {_show(current.get(key, '(absent)'))}"
        for key in sorted({*saved, *current})
        if saved.get(key, missing) != current.get(key, missing)
    ]
    if different:
        raise UserError(
            f"cannot resume from {path}: {'; '.join(different)}. Restore it, choose another output, "
            "or start again with --resume never"
        )


def changed_schedule(saved: dict[str, Any], step: int, settings: Any) -> str:
    """Say how the learning rate goes on at `step` where the number of steps is another one; "" where it is the same.

    The schedule is that of the new number: a cosine of 200 steps that is resumed for 400 rises again to its middle.
    """
    was = saved.get("trainer.steps", settings.steps)
    if was == settings.steps or step >= settings.steps:
        return ""
    before, now = (
        settings.learning_rate * learning_rate_factor(min(step, steps), steps, settings.warmup, settings.schedule)
        for steps in (was, settings.steps)
    )
    rate = "" if before == now else f", and the learning rate follows their schedule: from {before:.3g} to {now:.3g}"
    return f"trainer.steps was {was}, now {settings.steps}: {settings.steps - step} are left{rate}"


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


def as_disk_full(error: Exception, doing: str) -> Exception:
    """Return a `DiskFull` with the fix if the error means a full disk, otherwise the error itself."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # The safetensors writer is native code and wraps the operating system's error in its own type, as text.
    if not full and "os error 28" not in str(error).lower() and "no space left" not in str(error).lower():
        return error
    return DiskFull(
        f"the disk is full while {doing} ({error}); nothing incomplete was left. Free some space or lower "
        "trainer.keep_checkpoints, then run the same command again: it goes on from the last checkpoint"
    )
