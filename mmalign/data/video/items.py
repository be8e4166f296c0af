"""Videos that a model is to be asked about: from a Shapes set, TempCompass's folder, or a table.

A table (parquet, JSONL, CSV or TSV) has `video`, a path relative to it, and where questions are asked `prompt`;
optional are `answer` (the right one), `aspect`, `fps` (of a video that does not say, or says it wrongly) and `id`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.core.errors import UserError
from mmalign.core.io.answers import rate
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.decode import CONTAINER_SUFFIXES
from mmalign.core.io.parquet import iterate_columns, open_parquet
from mmalign.core.io.tables import TABLE_SUFFIXES, column, prompt_column, read_rows
from mmalign.core.io.video_questions import FORMATS, VideoQuestion
from mmalign.core.resources import find
from mmalign.core.seeds import derive_seed
from mmalign.data.readers.tabular import ID_COLUMNS
from mmalign.data.video.question_set import READ_BY_RULES, read_asked
from mmalign.shapes.questions import ShapesQuestion, judge_caption
from mmalign.shapes.video import VideoScene
from mmalign.shapes.video_set import QUESTIONS, read_videos

INSTRUCTIONS = (
    "Describe the video.",
    "What happens in this video, from start to end?",
    "Tell what is going on in the video, in the order in which it happens.",
    "Give a timeline of what the video shows.",
    "Describe the video step by step.",
    "Write down what can be seen, and how it changes over time.",
)
"""What a model is asked where nothing else is; one is drawn for every video by (seed, id)."""

Instruct = Callable[[str], str]
"""The id of a video -> what a model is asked about it."""


@dataclass(frozen=True)
class VideoItem:
    """Something to be asked about a video.

    `question` and `answer` are None where the right answer is unknown; `scene` is the scene graph of a Shapes video;
    `fps` that of a file that does not say.
    """

    id: str
    file: Path
    prompt: str
    question: VideoQuestion | None = None
    answer: str | None = None
    aspect: str | None = None
    fps: float | None = None
    scene: VideoScene | None = None

    def right(self, given: str) -> bool | None:
        """Tell whether an answer is right; None if nobody knows.

        Questions are marked by the rules of their format, and captions of Shapes by exact rules; an answer of a table
        is right if it is the table's but for case, blanks and a full stop, or the letter of the table's option.
        """
        if self.question is not None:
            judge = judge_caption if isinstance(self.question, ShapesQuestion) else None
            return rate(self.question, given, judge).right
        if self.answer is None:
            return None
        said, wanted = _plain(given), _plain(self.answer)
        return said == wanted or (bool(re.match(r"[a-d][.)] ", wanted)) and said.rstrip(")") == wanted[0])


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def is_video_source(source: str) -> bool:
    """Tell whether a source holds videos: a folder of questions and videos, or a table with a column `video`."""
    try:
        path = find(source)
    except UserError:
        return False
    if path.is_dir():
        return (path / QUESTIONS).is_file() or (path / "videos").is_dir()
    return path.suffix.lower() in TABLE_SUFFIXES and "video" in _columns(path)


def read_video_items(
    source: str,
    *,
    questions: bool,
    seed: int = 0,
    limit: int | None = None,
    instructions: Sequence[str] = INSTRUCTIONS,
) -> list[VideoItem]:
    """Return what is asked about the videos of a source: its questions, or one of `instructions` about every video.

    Questions that ask for a caption are only asked of Shapes videos, where captions can be judged.

    Raises:
        UserError: no such source, a malformed table, a video that is not there, an id that occurs twice.
    """
    path = find(source)
    instruct = partial(_instruction, instructions, seed)
    items = list(_folder_items(path, source, questions, instruct) if path.is_dir() else
                 _table_items(path, questions, instruct))[:limit]  # fmt: skip
    if not items:
        raise UserError(f"{source}: holds no videos")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{source}: id '{item.id}' occurs more than once, and ids seed what is drawn at random")
        seen.add(item.id)
        if not item.file.exists():
            raise UserError(f"{source}: '{item.id}' is about {item.file}, which does not exist")
    return items


def _folder_items(folder: Path, source: str, questions: bool, instruct: Instruct) -> Iterator[VideoItem]:
    shapes = (folder / QUESTIONS).is_file()
    scenes = {row.video: row for row in read_videos(folder)} if shapes else {}
    if questions:
        for asked in read_asked(source, FORMATS if shapes else READ_BY_RULES):
            one = asked.question
            scene = scenes[one.video].scene if shapes else None
            yield VideoItem(one.id, asked.file, one.prompt, one, one.label, one.aspect, scene=scene)
    elif shapes:
        for row in scenes.values():
            yield VideoItem(row.video, row.file, instruct(row.video), scene=row.scene)
    else:
        for file in sorted((folder / "videos").iterdir()):
            if file.suffix.lower() in CONTAINER_SUFFIXES:
                yield VideoItem(file.stem, file, instruct(file.stem))


def _instruction(instructions: Sequence[str], seed: int, name: str) -> str:
    return instructions[derive_seed(seed, "instruction", name) % len(instructions)]


def _table_items(path: Path, questions: bool, instruct: Instruct) -> Iterator[VideoItem]:
    found = _columns(path)
    if "video" not in found:
        raise missing_columns(str(path), ["video"], found)
    asks, names = prompt_column(found), column(found, ID_COLUMNS)
    if questions and asks is None:
        raise missing_columns(str(path), ["prompt"], found, "; or describe the videos: --mode answers")
    for number, row in enumerate(_rows(path, found)):
        where = f"{path}: row {number}"
        name = str(number if names is None or row.get(names) is None else row[names])
        video, prompt = row.get("video"), None if asks is None else row.get(asks)
        if not isinstance(video, str) or not video:
            raise UserError(
                f"{where}: video is {type(video).__name__}; give the path of a file, relative to the table"
            )
        if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
            raise UserError(f"{where} has no text in column '{asks}' ({prompt!r})")
        yield VideoItem(
            name,
            path.parent / video,
            prompt or instruct(name),
            answer=_text(row.get("answer")) if questions else None,
            aspect=_text(row.get("aspect")),
            fps=_rate(row.get("fps"), where),
        )


def _columns(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return list(open_parquet(path).schema_arrow.names)
    return list(dict.fromkeys(key for row in read_rows(path) for key in row))


def _rows(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    if path.suffix.lower() != ".parquet":
        yield from read_rows(path)
        return
    for batch in iterate_columns(path, columns):
        yield from batch.to_pylist()


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _rate(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        rate_given = float(value)
    except (TypeError, ValueError):
        rate_given = 0.0
    if not rate_given > 0:
        raise UserError(f"{where}: fps {value!r}; a rate is a number above 0")
    return rate_given
