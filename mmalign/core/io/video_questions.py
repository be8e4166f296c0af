"""Questions about videos in TempCompass's formats, and a reader for its official files.

TempCompass (Liu et al. 2024, arXiv 2403.00476; github.com/llyx97/TempCompass) asks about five temporal aspects in four
formats. Every file maps a video id to aspects, and an aspect to a list of `{"question": ..., "answer": ...}`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mmalign.core.errors import UserError, did_you_mean

FORMATS = ("multi-choice", "yes_no", "caption_matching", "captioning")
READ_BY_RULES = tuple(name for name in FORMATS if name != "captioning")
"""Formats whose answers are rated without a judge."""
ASPECTS = ("action", "direction", "speed", "order", "attribute_change")
"""TempCompass's aspects, all of them temporal: no single frame answers such a question."""
STATIC = ("colour", "shape", "count")
"""Aspects of single-frame questions."""
TOPICS = {
    "direction": "direction",
    "speed": "speed",
    "first": "order",
    "last": "order",
    "growth": "attribute_change",
    "recolouring": "attribute_change",
    "motion": "action",
    "presence": "action",
    "colour": "colour",
    "shape": "shape",
    "count": "count",
}
"""Topic of a question, finer than its aspect -> that aspect."""
INSTRUCTIONS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}
"""The instruction that the official evaluation appends to a question of each format."""

_EDITED = re.compile(r"_reverse$|_concat_\d$|(?<=\d_\d{10})_\d$")


@dataclass(frozen=True)
class VideoQuestion:
    """One question about one video.

    answer: the whole option ("B. to the left", "yes", "Caption A: ..."); of a captioning question, the option of the
    information that the caption must convey. group: the same for questions about conflicting videos, which only a
    model that uses the order of frames answers all right.
    """

    id: str
    video: str
    aspect: str
    format: str
    text: str
    answer: str
    group: str

    @property
    def prompt(self) -> str:
        """The prompt for a model: the question and the instruction of its format."""
        return self.text + INSTRUCTIONS[self.format]

    @property
    def label(self) -> str:
        """The short answer that the matching rules accept: "B", "yes", "Caption A"."""
        return label_of(self.answer, self.format)


def label_of(answer: str, format_: str) -> str:
    """Return the label of a whole option, which decides whether it is right; captions and yes or no have no other."""
    mark = {"multi-choice": ". ", "caption_matching": ": "}.get(format_)
    return answer.partition(mark)[0] if mark else answer


def read_tempcompass(path: Path) -> list[VideoQuestion]:
    """Read TempCompass's official questions: the folder `questions` or one file named after its format.

    The group of a question is the video that its own was made from, with the aspect and format: reversed and
    concatenated versions of one video conflict.

    Raises:
        UserError: no such place, no file of a known name in it, or a file that is not in TempCompass's layout.
    """
    if path.is_dir():
        files = [path / f"{name}.json" for name in FORMATS if (path / f"{name}.json").exists()]
        if not files:
            raise UserError(f"{path}: none of {', '.join(f'{name}.json' for name in FORMATS)} is here")
    elif path.stem not in FORMATS:
        raise UserError(f"{path}: named after no format{did_you_mean(path.stem, FORMATS)} ({', '.join(FORMATS)})")
    else:
        files = [path]
    return [question for file in files for question in _read_file(file)]


def _read_file(file: Path) -> list[VideoQuestion]:
    try:
        videos = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable JSON file ({error})") from None
    questions = []
    try:
        for video, aspects in videos.items():
            base = _EDITED.sub("", video)
            for aspect, entries in aspects.items():
                for number, entry in enumerate(entries):
                    questions.append(
                        VideoQuestion(
                            id=f"{file.stem}/{video}/{aspect}/{number}",
                            video=video,
                            aspect=aspect,
                            format=file.stem,
                            text=entry["question"],
                            answer=entry["answer"],
                            group=f"{file.stem}/{base}/{aspect}",
                        )
                    )
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{file}: not in TempCompass's layout, which is video -> aspect -> [question and answer]"
        ) from None
    unknown = sorted({question.aspect for question in questions} - set(ASPECTS))
    if unknown:
        raise UserError(f"{file}: unknown aspect '{unknown[0]}'{did_you_mean(unknown[0], ASPECTS)}")
    return questions
