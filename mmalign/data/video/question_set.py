"""Questions with the videos they are about: a folder that `mmalign shapes videos` wrote, or TempCompass's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.core.errors import UserError
from mmalign.core.io.decode import CONTAINER_SUFFIXES
from mmalign.core.io.video_questions import FORMATS, VideoQuestion, read_tempcompass
from mmalign.core.resources import find
from mmalign.shapes.video_set import QUESTIONS, read_questions, read_videos

READ_BY_RULES = tuple(name for name in FORMATS if name != "captioning")
"""Formats whose answers are read without a judge."""


@dataclass(frozen=True)
class AskedVideo:
    """A question and the file of its video."""

    question: VideoQuestion
    file: Path


def read_asked(source: str, formats: Sequence[str] = FORMATS) -> list[AskedVideo]:
    """Return the questions of a set in these formats.

    `source` is a folder with `questions.parquet` and `videos.parquet` (or that first file), or one with TempCompass's
    `questions/` (or its JSON files) and `videos/`.

    Raises:
        UserError: no such folder, neither layout, a question whose video is missing, or no question left.
    """
    path = find(source)
    folder = path if path.is_dir() else path.parent
    if (folder / QUESTIONS).is_file():
        files = {row.video: row.file for row in read_videos(folder)}
        questions: Sequence[VideoQuestion] = read_questions(folder)
    elif (folder / "videos").is_dir() and path.is_dir():
        files = {
            file.stem: file for file in (folder / "videos").iterdir() if file.suffix.lower() in CONTAINER_SUFFIXES
        }
        questions = read_tempcompass(folder / "questions" if (folder / "questions").is_dir() else folder)
    else:
        raise UserError(
            f"{source}: no questions about videos; give a folder that `mmalign shapes videos --out` wrote "
            f"({QUESTIONS}), or TempCompass's with questions/ and videos/ in it"
        )
    kept = [question for question in questions if question.format in formats]
    missing = [question.video for question in kept if not files.get(question.video, Path()).is_file()]
    if missing:
        raise UserError(f"{source}: {len(missing)} questions are about videos that are not there, {missing[0]} first")
    if not kept:
        raise UserError(f"{source}: no question in the formats {', '.join(formats)}")
    return [AskedVideo(question, files[question.video]) for question in kept]
