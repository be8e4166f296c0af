"""Tasks: the differences between training an image generator, a video generator and a vision-language model."""

from __future__ import annotations

from typing import Any

from mmalign.config.run import RunConfig
from mmalign.core.errors import UserError
from mmalign.training.tasks.base import Task
from mmalign.training.tasks.image import ImageTask
from mmalign.training.tasks.video import VideoTask
from mmalign.training.tasks.vlm import VlmTask

__all__ = ["TASKS", "Task", "task_of"]

TASKS: dict[str, Task[Any]] = {"image": ImageTask(), "video": VideoTask(), "vlm": VlmTask()}
"""`RunConfig.modality` -> its task."""


def task_of(config: RunConfig) -> Task[Any]:
    """Return the task of the method that a configuration names.

    Raises:
        UserError: there is none for its modality.
    """
    if config.modality not in TASKS:
        raise UserError(
            f"method '{config.method_name}' trains models of modality '{config.modality}'; allowed: {', '.join(TASKS)}"
        )
    return TASKS[config.modality]
