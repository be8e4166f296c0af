"""An overview of Shapes videos as one image: a family of every topic, a row a video, with question and answer."""

from __future__ import annotations

from PIL import Image

from mmalign.core.io.grid import image_grid
from mmalign.core.io.video_questions import STATIC, TOPICS
from mmalign.shapes.questions import ask
from mmalign.shapes.twins import sample_families
from mmalign.shapes.video import render


def contact_sheet(*, split: str = "train", seed: int = 0, size: int = 48) -> Image.Image:
    """Draw two members of a family of every temporal topic: eight frames each, beside the question and its answer."""
    topics = [topic for topic, aspect in TOPICS.items() if aspect not in STATIC]
    rows, labels = [], []
    for family in sample_families(len(topics), split, seed, topics=topics, size=size):
        questions = {question.member: question for question in ask(family, "sheet", seed, formats=("multi-choice",))}
        for member in (0, 1):
            text, answer = questions[member].text.split("\n")[0], questions[member].answer.split(". ", 1)[1]
            labels.append(f"{text} {answer}")
            rows.append([frame.float() / 255 for frame in render(family.scenes[member])])
    return image_grid(rows, row_labels=labels, cell=2 * size, row_label_width=300)
