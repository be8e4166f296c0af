"""Shapes videos as a question set (`mmalign.core.io.question_sets`), with truths read off the scene graphs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmalign.core.io.answers import Judge
from mmalign.core.io.question_sets import SetVideo
from mmalign.core.io.video_questions import VideoQuestion
from mmalign.shapes.facts import truth
from mmalign.shapes.questions import ShapesQuestion, as_shapes_question, judge_caption
from mmalign.shapes.video import Sighting, Track, VideoScene, unroll
from mmalign.shapes.video_set import QUESTIONS, VIDEOS, read_questions, read_videos


class ShapesQuestions:
    """A folder that `mmalign shapes videos` wrote, or the file of questions in it."""

    layout = f"a folder that `mmalign shapes videos --out` wrote ({QUESTIONS})"

    def __init__(self, path: Path) -> None:
        """Keep the folder; nothing is read."""
        self.folder = path if path.is_dir() else path.parent

    @staticmethod
    def holds(path: Path) -> bool:
        """Tell whether a folder has a file of questions, or a path is one."""
        file = path.name == QUESTIONS and path.with_name(VIDEOS).is_file()
        return file or (path / QUESTIONS).is_file()

    @property
    def judge(self) -> Judge:
        """Captions are judged by exact rules."""
        return judge_caption

    def videos(self) -> list[SetVideo]:
        """Return the videos with their scene graphs."""
        return [SetVideo(row.video, row.file, SceneTruth(row.scene)) for row in read_videos(self.folder)]

    def questions(self) -> list[ShapesQuestion]:
        """Return the questions, ready to be answered anew for other frames."""
        return read_questions(self.folder)


@dataclass(frozen=True)
class SceneTruth:
    """The truth about a video, from its scene graph."""

    scene: VideoScene

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.scene.frames

    def states(self) -> list[Hashable]:
        """Return the state of each frame; see `scene_states`."""
        return scene_states(unroll(self.scene), self.scene.size)

    def answer(self, question: VideoQuestion, order: Sequence[int]) -> str | None:
        """Return the answer that the frames `order` show; None if they show none of the options."""
        tracks = [tuple(track[index] for index in order) for track in unroll(self.scene)]
        return as_shapes_question(question).answer_of(tracks, self.scene.size)

    def fact(self, question: VideoQuestion) -> tuple[str, str | None]:
        """Return the topic of a question and its value in the whole video."""
        asked = as_shapes_question(question)
        return asked.topic, truth(asked.topic, asked.subject, unroll(self.scene), self.scene.size)


def scene_states(tracks: Sequence[Track], size: int) -> list[Hashable]:
    """Return the state of every shape in each frame: hidden or not, its colour, the signs of its motion and growth.

    The frame is `size` wide and wraps around. A frame takes its motion towards the next one that shows the shape,
    the last one from the frame before.
    """
    return list(zip(*(_actions(track, size) for track in tracks), strict=True))


def _actions(track: Track, size: int) -> list[Hashable]:
    actions: list[Hashable] = []
    for index, now in enumerate(track):
        if now is None:
            actions.append(None)
            continue
        after = track[index + 1] if index + 1 < len(track) else None
        before = track[index - 1] if index else None
        change = _change(now, after, size) if after else _change(before, now, size) if before else (0, 0, 0)
        actions.append((now.colour, *change))
    return actions


def _change(first: Sighting, second: Sighting, size: int) -> tuple[int, int, int]:
    """Signs of the step in x and y, the short way round, and of the growth."""
    steps = [(b - a + size / 2) % size - size / 2 for a, b in ((first.x, second.x), (first.y, second.y))]
    across, down, growth = (int(np.sign(round(value, 6))) for value in (*steps, second.radius - first.radius))
    return across, down, growth
