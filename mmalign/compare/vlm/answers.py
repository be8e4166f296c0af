"""The systems' answers to all questions about the videos, and about the same videos with shuffled frames."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmalign.compare.vlm.config import QuestionConfig
from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically
from mmalign.core.io.decode import Frames
from mmalign.core.io.spreadsheet import write_csv
from mmalign.core.seeds import derive_seed
from mmalign.data.video.answering import Answerer, Decoding, Request
from mmalign.data.video.items import QuestionItem, load_video_questions
from mmalign.data.video.perturbations import Perturbation
from mmalign.data.video.reading import VideoReader

_SINGLE_FRAMES = Perturbation(("block_shuffle",), 2**20)  # blocks of one frame each, however long the video


@dataclass(frozen=True)
class Sheet:
    """One model's answers to all questions, and which are right; with those about shuffled videos, if measured."""

    answers: list[str]
    right: list[bool]
    shuffled: list[str] | None = None
    right_shuffled: list[bool] | None = None


def choose_questions(config: QuestionConfig) -> list[QuestionItem]:
    """Return the questions of a comparison: at most `limit`, groups of twins whole.

    Raises:
        UserError: there are none, the limit is smaller than the first group, or captions without a judge.
    """
    items = load_video_questions(config.questions, config.formats)
    if "captioning" in config.formats and items[0].judge is None:
        raise UserError(f"formats: captioning needs a judge, and {config.questions} has none; leave it out")
    groups: dict[str, list[QuestionItem]] = {}
    for item in items:
        groups.setdefault(item.question.group, []).append(item)
    chosen: list[QuestionItem] = []
    for group in groups.values():
        if config.limit is not None and len(chosen) + len(group) > config.limit:
            break
        chosen += group
    if not chosen:
        twins = len(next(iter(groups.values())))
        raise UserError(f"limit {config.limit}: the first group of twins has {twins} questions; raise it")
    return chosen


def video_reader(config: QuestionConfig) -> VideoReader:
    """Return the reader of the frames that are shown."""
    return VideoReader(Frames(config.frames, config.fps))


def answer_questions(config: QuestionConfig, name: str, model: str, items: Sequence[QuestionItem]) -> Sheet:
    """Answer the questions by one model, greedily; answers are kept in `<output>/answers` by model and content.

    The frames of a video are shuffled by (seed, video), alike for every question about it and every model, and never
    left in their order.
    """
    decoding = Decoding(config.max_new_tokens, precision=config.precision)
    answerer = Answerer(model, decoding, Path(config.output) / "answers", batch_size=config.batch_size or 8)
    reader = video_reader(config)
    answers = _answer(reader, answerer, items, f"ask {name}", None)
    shuffled = None
    if config.shuffle_seed is not None:
        shuffled = _answer(reader, answerer, items, f"ask {name}, shuffled", config.shuffle_seed)
    answerer.close()
    right_shuffled = None if shuffled is None else _rate_all(items, shuffled)
    return Sheet(answers, _rate_all(items, answers), shuffled, right_shuffled)


def _answer(
    reader: VideoReader, answerer: Answerer, items: Sequence[QuestionItem], label: str, shuffle: int | None
) -> list[str]:
    return answerer.answer([_request(reader, one, shuffle) for one in items], label)


def _request(reader: VideoReader, item: QuestionItem, shuffle: int | None) -> Request:
    media_id = reader.media_id(item)
    if shuffle is None:
        return Request(item.prompt, media_id, partial(reader.show, item))
    seed = derive_seed(shuffle, "shuffle", item.question.video)
    show = partial(reader.show, item, _SINGLE_FRAMES, seed)
    return Request(item.prompt, f"{media_id}+{_SINGLE_FRAMES}+{seed}", show)


def _rate_all(items: Sequence[QuestionItem], answers: Sequence[str]) -> list[bool]:
    return [item.right(answer) for item, answer in zip(items, answers, strict=True)]


def write_answers(items: Sequence[QuestionItem], sheets: dict[str, Sheet], path: Path) -> None:
    """Write every answer as CSV: a row for each question and model, `system` being `NAME` or `NAME-seed<k>`."""
    buffer = io.StringIO()
    columns = ["id", "video", "aspect", "format", "group", "question", "answer"]
    rows: list[list[object]] = [[*columns, "system", "given", "right", "given_shuffled", "right_shuffled"]]
    for name, sheet in sheets.items():
        for index, item in enumerate(items):
            q = item.question
            after = ["", ""]
            if sheet.shuffled is not None and sheet.right_shuffled is not None:
                after = [sheet.shuffled[index], str(int(sheet.right_shuffled[index]))]
            facts = [q.id, q.video, q.aspect, q.format, q.group, q.text, q.answer]
            rows.append([*facts, name, sheet.answers[index], int(sheet.right[index]), *after])
    write_csv(buffer, rows)
    write_atomically(path, buffer.getvalue())
