"""Sets of videos with questions: the protocol of a set, how one is recognised, and TempCompass's own layout.

A third party's set joins by an entry point, which names a class that satisfies `QuestionSet`:

    [project.entry-points."mmalign.question_sets"]
    street-scenes = "their_package.scenes:StreetScenes"
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmalign.core.io.answers import Judge
from mmalign.core.io.decode import CONTAINER_SUFFIXES
from mmalign.core.io.video_questions import VideoQuestion, read_tempcompass
from mmalign.core.registry import question_sets


class Truth(Protocol):
    """The truth about one video, known without its pixels, such as from a scene graph."""

    @property
    def frames(self) -> int:
        """The number of frames."""

    def states(self) -> list[Hashable]:
        """Return the state of each frame; frames of equal states show the same event."""

    def answer(self, question: VideoQuestion, order: Sequence[int]) -> str | None:
        """Return the right answer to a question if only the frames `order` were shown, in that order.

        None: they show none of the answers on offer.
        """

    def fact(self, question: VideoQuestion) -> tuple[str, str | None]:
        """Return the topic of a question, a key of `TOPICS`, and its value in this video (None: it has none)."""


@dataclass(frozen=True)
class SetVideo:
    """One video of a set: its name in questions, its file, and its truth where that is known."""

    name: str
    file: Path
    truth: Truth | None = None


class QuestionSet(Protocol):
    """A folder of videos with questions in the formats of `mmalign.core.io.video_questions`."""

    layout: str
    """the required kind of path, in the words of an error message: "a folder with ..." """

    def __init__(self, path: Path) -> None:
        """Open the set at a path that `holds` accepts."""

    @staticmethod
    def holds(path: Path) -> bool:
        """Tell whether such a set lies at a path, without reading it."""

    @property
    def judge(self) -> Judge | None:
        """The judge of answers that no rule can read, above all captions; None: no judge."""

    def videos(self) -> list[SetVideo]:
        """Return the videos.

        Raises:
            UserError: they cannot be read.
        """

    def questions(self) -> Sequence[VideoQuestion]:
        """Return the questions; each is about the video of that name.

        Raises:
            UserError: they cannot be read.
        """


class TempCompass:
    """TempCompass's folder: `videos/`, and its JSON files in `questions/` or beside it."""

    layout = "TempCompass's with questions/ and videos/ in it"
    judge: Judge | None = None

    def __init__(self, path: Path) -> None:
        """Keep the folder; nothing is read."""
        self.folder = path

    @staticmethod
    def holds(path: Path) -> bool:
        """Tell whether a folder has `videos/`; its videos may be described where it has no questions."""
        return (path / "videos").is_dir()

    def videos(self) -> list[SetVideo]:
        """Return the video files by their names without suffix, sorted."""
        files = sorted((self.folder / "videos").iterdir())
        return [SetVideo(file.stem, file) for file in files if file.suffix.lower() in CONTAINER_SUFFIXES]

    def questions(self) -> list[VideoQuestion]:
        """Return the questions.

        Raises:
            UserError: there are none, or a file is not in TempCompass's layout.
        """
        inner = self.folder / "questions"
        return read_tempcompass(inner if inner.is_dir() else self.folder)


def find_question_set(path: Path) -> QuestionSet | None:
    """Return the set that lies at a path, or None; TempCompass is tried last, since any set may have `videos/`."""
    kinds: list[type[QuestionSet]] = [*map(question_sets.get, question_sets.names()), TempCompass]
    return next((kind(path) for kind in kinds if kind.holds(path)), None)


def known_layouts() -> str:
    """Return the known kinds of question sets, in the words of an error message."""
    return ", or ".join(kind.layout for kind in [*map(question_sets.get, question_sets.names()), TempCompass])
