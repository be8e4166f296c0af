"""Videos with questions for a model: from a set of videos with questions, or a table.

A table (parquet, JSONL, CSV or TSV) has `video`, a path relative to it, and for questions `prompt`;
optional are `answer` (the right one), `aspect`, `fps` (of a video that does not state it, or states it wrongly) and
`id`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.core.errors import UserError
from mmalign.core.io.answer_matching import match_answer
from mmalign.core.io.answers import Judge, rate
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.question_sets import Truth, find_question_set, known_layouts
from mmalign.core.io.tables import TABLE_SUFFIXES, Table, column, prompt_column
from mmalign.core.io.video_questions import FORMATS, READ_BY_RULES, VideoQuestion
from mmalign.core.resources import find
from mmalign.core.seeds import derive_seed
from mmalign.data.readers.tabular import ID_COLUMNS

INSTRUCTIONS = (
    "Describe the video.",
    "What happens in this video, from start to end?",
    "Tell what is going on in the video, in the order in which it happens.",
    "Give a timeline of what the video shows.",
    "Describe the video step by step.",
    "Write down what can be seen, and how it changes over time.",
)
"""Default instructions for a model; one is drawn for every video by (seed, id)."""

Instruct = Callable[[str], str]
"""The id of a video -> the instruction for a model."""


@dataclass(frozen=True)
class VideoItem:
    """A video and a question about it.

    `answer` is the right one in the expected form, None where it is unknown; `fps` the rate of a file that does not
    state it; `truth` the known truth about the video.
    """

    id: str
    file: Path
    prompt: str
    answer: str | None = None
    aspect: str | None = None
    fps: float | None = None
    truth: Truth | None = None

    def right(self, given: str) -> bool | None:
        """Tell whether an answer is right by the rules of `match_answer`; None if they, or the item, do not tell."""
        return None if self.answer is None else match_answer(given, self.answer)

    def wrong(self, given: str) -> bool:
        """Tell whether an answer is known to be wrong; one that may be right is not."""
        return self.right(given) is False


@dataclass(frozen=True, kw_only=True)
class QuestionItem(VideoItem):
    """A question of a set, whose answers are rated by the rules of its format, or else by `judge`."""

    question: VideoQuestion
    judge: Judge | None = None

    def right(self, given: str) -> bool:
        """Tell whether an answer is right; one that no rule can read is wrong without a judge."""
        return rate(self.question, given, self.judge).right

    def wrong(self, given: str) -> bool:
        """Tell whether an answer is known to be wrong; one that no rule can read may be right."""
        rating = rate(self.question, given, self.judge)
        if rating.right or rating.matched or self.question.format not in READ_BY_RULES:
            return not rating.right
        return match_answer(given, self.question.answer) is False


def is_video_source(source: str) -> bool:
    """Tell whether a source holds videos: a set of videos with questions, or a table with a column `video`."""
    try:
        path = find(source)
    except UserError:
        return False
    if find_question_set(path) is not None:
        return True
    return path.is_file() and path.suffix.lower() in TABLE_SUFFIXES and "video" in Table(path).columns


def load_video_questions(source: str, formats: Sequence[str] | None = None) -> list[QuestionItem]:
    """Return the questions of a set in these formats, or in all whose answers it can rate.

    `source` is the path of a set of any kind that `mmalign.core.io.question_sets` knows.

    Raises:
        UserError: no such set, a question whose video is missing, or no question left.
    """
    found = find_question_set(find(source))
    if found is None:
        raise UserError(f"{source}: no questions about videos; give {known_layouts()}")
    if formats is None:
        formats = READ_BY_RULES if found.judge is None else FORMATS
    videos = {video.name: video for video in found.videos() if video.file.is_file()}
    kept = [question for question in found.questions() if question.format in formats]
    missing = [question.video for question in kept if question.video not in videos]
    if missing:
        raise UserError(f"{source}: {len(missing)} questions are about videos that are not there, {missing[0]} first")
    if not kept:
        raise UserError(f"{source}: no question in the formats {', '.join(formats)}")
    return [
        QuestionItem(one.id, video.file, one.prompt, one.label, one.aspect, None, video.truth,
                     question=one, judge=found.judge)
        for one in kept
        for video in [videos[one.video]]
    ]  # fmt: skip


def read_video_items(
    source: str,
    *,
    questions: bool,
    seed: int = 0,
    limit: int | None = None,
    instructions: Sequence[str] = INSTRUCTIONS,
) -> list[VideoItem]:
    """Return the items of a source: its questions, or one of `instructions` for every video.

    Questions that ask for a caption are only asked where the set has a judge of captions.

    Raises:
        UserError: no such source, a malformed table, a video that is not there, an id that occurs twice.
    """
    path = find(source)
    instruct = partial(_instruction, instructions, seed)
    found = find_question_set(path)
    items: list[VideoItem]
    if found is None and path.is_file():
        items = list(_table_items(path, questions, instruct))
    elif found is None or questions:
        items = list(load_video_questions(source))  # otherwise the error that there is no set
    else:
        items = [VideoItem(one.name, one.file, instruct(one.name), truth=one.truth) for one in found.videos()]
    items = items[:limit]
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


def _instruction(instructions: Sequence[str], seed: int, name: str) -> str:
    return instructions[derive_seed(seed, "instruction", name) % len(instructions)]


def _table_items(path: Path, questions: bool, instruct: Instruct) -> Iterator[VideoItem]:
    table = Table(path)
    found = table.columns
    if "video" not in found:
        raise missing_columns(str(path), ["video"], found)
    asks, names = prompt_column(found), column(found, ID_COLUMNS)
    if questions and asks is None:
        raise missing_columns(str(path), ["prompt"], found, "; or describe the videos: --mode answers")
    for number, row in enumerate(table.rows(found)):
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
        raise UserError(f"{where}: fps {value!r}; the rate must be a number above 0")
    return rate_given
