"""The questions of a report: the frames of the video as a strip, the question, and every system's answer, marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mmalign.compare.report.thumbnails import PIXEL_ART_SIDE, Thumbnail, choose_prompts
from mmalign.compare.vlm.answers import Sheet, video_reader
from mmalign.compare.vlm.config import QuestionConfig
from mmalign.compare.vlm.results import ACCURACY
from mmalign.core.io.decode import Frames
from mmalign.data.video.items import QuestionItem

MOST_QUESTIONS = 300
"""Above this number, only some questions are shown, evenly spaced and never chosen by their answers."""
MOST_FRAMES = 8
FRAME_SIDE = 128
"""Frames wider or higher than this are shrunk to it."""
_GAP = 2


def question_gallery(
    config: QuestionConfig, items: Sequence[QuestionItem], sheets: Mapping[str, Sheet]
) -> dict[str, Any]:
    """Return the cards of the questions; `sheets` are the answer sheets to show, by system."""
    shown = choose_prompts(len(items), 1, MOST_QUESTIONS)
    reader, strips, cards = video_reader(config), {}, []
    for position, index in enumerate(shown):
        item = items[index]
        if item.file not in strips:
            strips[item.file] = strip(reader.show(item).media[0])
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


def strip(video: UInt8[Tensor, "frames 3 height width"]) -> Thumbnail:
    """Return at most `MOST_FRAMES` frames of a video, evenly spaced, side by side."""
    images = []
    for index in Frames(MOST_FRAMES).choose(len(video), None):
        image = Image.fromarray(video[index].permute(1, 2, 0).numpy())
        image.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.LANCZOS)
        images.append(image)
    width, height = images[0].size
    whole = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, height), "white")
    for number, image in enumerate(images):
        whole.paste(image, (number * (width + _GAP), 0))
    small = max(video.shape[-2:]) <= PIXEL_ART_SIDE
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    whole.save(buffer, format=kind, **({} if small else {"quality": 82}))
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, *whole.size, shrunk=(width, height) != (video.shape[-1], video.shape[-2]), pixelated=small)
