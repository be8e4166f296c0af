"""Questions about Shapes videos: TempCompass's aspects and formats, with exact answers and conflicting twins.

All questions of a family (:mod:`mmalign.shapes.twins`) have the same text for every member of the family, and another
answer for each: every option is right equally often given the text, "yes" is right for half of the videos of a
question, and so is the first of two captions. A language prior therefore scores exactly chance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmalign.core.io.video_questions import FORMATS, TOPICS, VideoQuestion, label_of
from mmalign.shapes.facts import truth
from mmalign.shapes.twins import Family
from mmalign.shapes.video import Track
from mmalign.shapes.wording import QUESTIONS, Said, name_of, say

_CAPTION_HEADS = (
    "Which caption matches the video better?\nCaption A: {0}\nCaption B: {1}",
    "Which description is a more suitable match for the video?\nOption 1: {0}\nOption 2: {1}",
    "Which sentence better captures the essence of the video?\nSentence A: {0}\nSentence B: {1}",
)
_CAPTIONING = "One piece of information fits the video. Write a short caption with it.\n{0}\nGenerated Caption:"
LETTERS = "ABCD"


@dataclass(frozen=True)
class ShapesQuestion(VideoQuestion):
    """A question with the facts to answer it again for other frames, and to judge a caption.

    topic, subject: arguments of :func:`mmalign.shapes.facts.truth`. answers: (value, answer) for every possible value.
    names: the words for the subject. member: the number of its video.
    """

    topic: str
    subject: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    member: int

    @property
    def label(self) -> str:
        """The right answer in the expected form: the label of an option, or a caption."""
        return self.stating(next(value for value, answer in self.answers if answer == self.answer))

    def stating(self, value: str) -> str:
        """The right answer if `value`, one of the options, were the truth."""
        if self.format == "captioning":
            return say(self.topic, value, self.subject, self.names).statement
        return label_of(dict(self.answers)[value], self.format)

    def answer_of(self, tracks: Sequence[Track], size: int) -> str | None:
        """The right answer for a video with these tracks; None if it shows none, or none of the options."""
        value = truth(self.topic, self.subject, tracks, size)
        return None if value is None else dict(self.answers).get(value)


def ask(family: Family, name: str, seed: int = 0, formats: Sequence[str] = FORMATS) -> list[ShapesQuestion]:
    """All questions about the members of a family; `name` is its name, `{name}-{k}` the id of member k's video.

    The same arguments give the same questions. Every format asks every member, yes/no and caption matching twice
    where there are more than two members.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    names = tuple(name_of(family, shape) for shape in family.subject)
    said = {value: say(family.topic, value, family.subject, names) for value in family.values}
    made = []
    for format_ in formats:
        for number, (text, answers, members) in enumerate(_MAKERS[format_](rng, family, said, names)):
            group = f"{name}/{format_}/{number}"
            for member in members:
                value = family.values[member]
                made.append(
                    ShapesQuestion(
                        f"{group}/{member}", f"{name}-{member}", TOPICS[family.topic], format_, text, answers[value],
                        group, family.topic, family.subject, tuple(answers.items()), names, member,
                    )
                )  # fmt: skip
    return made


Asked = list[tuple[str, dict[str, str], Sequence[int]]]
"""(text, answer for each value of the truth, members with the question)."""


def _question(rng: np.random.Generator, family: Family, names: tuple[str, ...]) -> str:
    wordings = QUESTIONS[family.topic]
    return wordings[int(rng.integers(len(wordings)))].format(*names)


def _options(rng: np.random.Generator, family: Family, said: dict[str, Said]) -> dict[str, str]:
    """value -> "B. phrase", the options in random order."""
    order = rng.permutation(len(family.values))
    return {
        family.values[i]: f"{letter}. {said[family.values[i]].option}"
        for letter, i in zip(LETTERS, order, strict=False)
    }


def _multiple_choice(rng: np.random.Generator, family: Family, said: dict[str, Said], names: tuple[str, ...]) -> Asked:
    options = _options(rng, family, said)
    text = "\n".join([_question(rng, family, names), *options.values()])
    return [(text, options, range(len(family.values)))]


def _captioning(rng: np.random.Generator, family: Family, said: dict[str, Said], names: tuple[str, ...]) -> Asked:
    options = _options(rng, family, said)
    lines = [f"Information {option[0]}: {said[value].information}" for value, option in options.items()]
    return [(_CAPTIONING.format("\n".join(lines)), options, range(len(family.values)))]


def _yes_no(rng: np.random.Generator, family: Family, said: dict[str, Said], names: tuple[str, ...]) -> Asked:
    """A question about each value for the video that has it and for one other."""
    number = len(family.values)
    shift = int(rng.integers(1, number))
    asked: Asked = []
    for member, value in enumerate(family.values):
        answers = {other: "yes" if other == value else "no" for other in family.values}
        asked.append((said[value].yes_no, answers, (member, (member + shift) % number)))
    return asked


def _caption_matching(
    rng: np.random.Generator, family: Family, said: dict[str, Said], names: tuple[str, ...]
) -> Asked:
    """A question about the captions of two members, neighbours in a random circle, for both."""
    order = rng.permutation(len(family.values)).tolist()
    asked: Asked = []
    for pair in list(pairwise([*order, order[0]]))[: len(order) if len(order) > 2 else 1]:
        first, second = (family.values[member] for member in pair)
        head = _CAPTION_HEADS[int(rng.integers(len(_CAPTION_HEADS)))]
        text = head.format(said[first].statement, said[second].statement)
        lines = text.split("\n")[1:]
        asked.append((text, {first: lines[0], second: lines[1]}, pair))
    return asked


_MAKERS = {
    "multi-choice": _multiple_choice, "yes_no": _yes_no,
    "caption_matching": _caption_matching, "captioning": _captioning,
}  # fmt: skip


def as_shapes_question(question: VideoQuestion) -> ShapesQuestion:
    """Return a question as one about a Shapes video.

    Raises:
        TypeError: it is of another set.
    """
    if not isinstance(question, ShapesQuestion):
        raise TypeError(f"question '{question.id}' is not about a Shapes video; the rules of Shapes cannot judge it")
    return question


def judge_caption(question: VideoQuestion, caption: str) -> bool:
    """Answer the question from the caption alone, as TempCompass's judge does, but by exact rules.

    The clauses that name the subject are searched for the words of every value; the caption is right if they hold the
    words of the true value and of no other. No clause, no words or several values count as "none correct". So does an
    answer that is no caption: one of another format that its rules cannot read, such as one option's label before the
    words of another.
    """
    question = as_shapes_question(question)
    if question.format != "captioning":
        return False
    clauses = re.split(r"[.;,\n]|\bwhile\b|\band then\b|\bthen\b|\band(?= (?:the|a|an|there)\b)", caption.lower())
    if question.topic != "speed" and question.names:
        nouns = {word for name in question.names for word in (name, name.removeprefix("the "))}
        clauses = [clause for clause in clauses if any(re.search(rf"\b{noun}\b", clause) for noun in nouns)]
    text = " . ".join(clauses) if question.topic != "speed" else caption.lower()
    stated = {
        answer for value, answer in question.answers
        if re.search(say(question.topic, value, question.subject, question.names).words, text)
    }  # fmt: skip
    return stated == {question.answer}
