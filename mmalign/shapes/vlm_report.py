"""How well a video language model answers questions about Shapes videos that training has never shown.

Answers are generated and marked as TempCompass marks them, captions by exact rules; then once more with the frames of
every video in another order, with the right answers unchanged: the drop in accuracy measures the use of temporal
order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from mmalign.core.files import write_atomically
from mmalign.core.io.answers import accuracy_by, micro_accuracy, rate, shuffle_sensitivity, twin_accuracy
from mmalign.core.io.video_questions import FORMATS, TOPICS
from mmalign.core.progress import track
from mmalign.shapes.questions import ShapesQuestion, ask, judge_caption
from mmalign.shapes.twins import sample_families
from mmalign.shapes.video import render

if TYPE_CHECKING:
    from pipelines.vlm.model import VisionLanguageModel

AT_ONCE = 32
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Line:
    """Results on some of the questions, as shares of 1.

    accuracy: by format, and "all". chance: the accuracy of guessing. twins: groups of conflicting questions all right.
    shuffled: the loss in accuracy with other orders of the frames.
    """

    accuracy: dict[str, float]
    chance: float
    twins: float
    shuffled: float
    questions: int


def measure(model: VisionLanguageModel, families: int, *, split: str = "validation", seed: int = 0) -> dict[str, Line]:
    """Ask all questions about the families, and return a line for every topic and for "all"."""
    questions: list[ShapesQuestion] = []
    right: list[bool] = []
    right_shuffled: list[bool] = []
    with track(families, "question", "families") as job:
        for number, family in enumerate(sample_families(families, split, seed)):
            asked = ask(family, f"{split}-{number}", seed)
            videos = [render(scene) for scene in family.scenes]
            rng = np.random.default_rng([seed, number])
            questions += asked
            right += _marks(model, asked, videos)
            right_shuffled += _marks(model, asked, [video[_order(rng, len(video))] for video in videos])
            job.advance(1)
    present = [topic for topic in TOPICS if any(question.topic == topic for question in questions)]
    lines = {}
    for name in ("all", *present):
        kept = [index for index, question in enumerate(questions) if name in ("all", question.topic)]
        lines[name] = _line(
            [questions[index] for index in kept],
            [right[index] for index in kept],
            [right_shuffled[index] for index in kept],
        )
    return lines


def _marks(model: VisionLanguageModel, asked: Sequence[ShapesQuestion], videos: Sequence[Tensor]) -> list[bool]:
    answers: list[str] = []
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        media = [[videos[question.member]] for question in part]
        answers += model.generate([question.prompt for question in part], media, max_new_tokens=MAX_NEW_TOKENS)
    return [rate(question, answer, judge_caption).right for question, answer in zip(asked, answers, strict=True)]


def _order(rng: np.random.Generator, frames: int) -> Tensor:
    """Another order than forwards and backwards."""
    while True:
        order = rng.permutation(frames)
        if len(set(np.diff(order).tolist())) > 1:
            return torch.from_numpy(order)


def _line(questions: list[ShapesQuestion], right: list[bool], right_shuffled: list[bool]) -> Line:
    accuracy = accuracy_by(questions, right, lambda question: question.format)
    by_format = {format_: accuracy[format_] for format_ in FORMATS if format_ in accuracy}
    options = [len(q.answers) if q.format in ("multi-choice", "captioning") else 2 for q in questions]
    return Line(
        {**by_format, "all": micro_accuracy(right)},
        sum(1 / number for number in options) / len(options),
        twin_accuracy(questions, right),
        shuffle_sensitivity(questions, right, right_shuffled)["all"],
        len(questions),
    )


def write_report(lines: dict[str, Line], path: Path) -> None:
    """Write the lines as JSON."""
    write_atomically(path, json.dumps({name: asdict(line) for name, line in lines.items()}, indent=2) + "\n")


def as_table(lines: dict[str, Line]) -> Table:
    """The lines as a table, in per cent."""
    table = Table(title="answers about validation videos, %", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("topic", "choice", "yes/no", "match", "caption", "all", "chance", "twins", "shuffle"):
        table.add_column(column, justify="left" if column == "topic" else "right", no_wrap=True)
    for name, line in lines.items():
        shares = [*(line.accuracy[key] for key in (*FORMATS, "all")), line.chance, line.twins, line.shuffled]
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares))
    return table
