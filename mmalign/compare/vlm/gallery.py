"""The questions of a report: the frames of the video as a strip, the question, and every system's answer, marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.compare.report.thumbnails import choose_prompts, frame_strip
from mmalign.compare.vlm.answers import Sheet, video_reader
from mmalign.compare.vlm.config import QuestionConfig
from mmalign.compare.vlm.results import ACCURACY
from mmalign.data.video.items import QuestionItem

MOST_QUESTIONS = 300
"""Above this number, only some questions are shown, evenly spaced and never chosen by their answers."""
MOST_FRAMES = 8
FRAME_SIDE = 128
"""Frames wider or higher than this are shrunk to it."""


def question_gallery(
    config: QuestionConfig, items: Sequence[QuestionItem], sheets: Mapping[str, Sheet]
) -> dict[str, Any]:
    """Return the cards of the questions; `sheets` are the answer sheets to show, by system."""
    shown = choose_prompts(len(items), 1, MOST_QUESTIONS)
    reader, strips, cards = video_reader(config), {}, []
    for position, index in enumerate(shown):
        item = items[index]
        if item.file not in strips:
            strips[item.file] = frame_strip(reader.show(item).media[0], MOST_FRAMES, FRAME_SIDE)
        answers = {name: {"text": sheet.answers[index], "right": sheet.right[index]} for name, sheet in sheets.items()}
        question = item.question
        cards.append(
            {"position": position, "number": index + 1, "prompt": question.text, "category": question.aspect,
             "format": question.format, "truth": question.answer, "strip": strips[item.file], "answers": answers}
        )  # fmt: skip
    notes = []
    if len(shown) < len(items):
        notes.append(
            f"Shown: {len(shown)} of {len(items)} questions, evenly spaced over the set and not picked by answers, to "
            "keep the page light; all answers are in answers.csv beside this page."
        )
    words = {ACCURACY: {"0": "wrong", "1": "right"}}
    return {"template": "vlm_report.html.j2", "cards": cards, "shown": shown, "notes": notes, "words": words}
