"""Answers to video questions: TempCompass's matching rules, and accuracies that a blind model cannot have.

The rules follow the official evaluation (github.com/llyx97/TempCompass, eval_*.py): an answer that no rule can read is
given to a judge, and counts as wrong without one. "(A)" and "Answer: A" are such answers. All averages are over
questions, not over videos or aspects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from mmalign.core.io.video_questions import VideoQuestion

LETTERS = ("A", "B", "C", "D")
Judge = Callable[[VideoQuestion, str], bool]
"""Says whether a response answers a question right; called only where the rules cannot decide."""


@dataclass(frozen=True)
class Rating:
    """Whether a response is right, and whether a rule decided it rather than a judge or the default."""

    right: bool
    matched: bool


def rate(question: VideoQuestion, response: str, judge: Judge | None = None) -> Rating:
    """Rate a response by the rules of the question's format, or else by `judge`; wrong if there is none."""
    response = response.replace("</s>", "").strip()
    right = _RULES[question.format](question, response)
    if right is not None:
        return Rating(right, matched=True)
    return Rating(judge is not None and judge(question, response), matched=False)


def _multiple_choice(question: VideoQuestion, response: str) -> bool | None:
    if response == question.answer:
        return True
    if response in LETTERS or response.startswith(tuple(f"{letter}{mark}" for letter in LETTERS for mark in ".)")):
        return response[0] == question.answer[0]
    return None


def _yes_no(question: VideoQuestion, response: str) -> bool | None:
    said = next((word for word in ("yes", "no") if response.lower().startswith(word)), None)
    return None if said is None else said == question.answer


def _caption_matching(question: VideoQuestion, response: str) -> bool | None:
    """The option, its sentence, its label ("Caption A") or the label's last word, with or without a full stop."""
    for option in question.text.split("\n")[1:]:
        label, _, sentence = option.partition(": ")
        labels = (label, label.split()[-1])
        bare = response.partition(") ")[2]
        if response in (option, sentence, *labels) or response.replace(".", "") in labels or bare == sentence:
            return option == question.answer
    return None


_RULES: dict[str, Callable[[VideoQuestion, str], bool | None]] = {
    "multi-choice": _multiple_choice,
    "yes_no": _yes_no,
    "caption_matching": _caption_matching,
    "captioning": lambda question, response: None,
}


def accuracy_by(
    questions: Sequence[VideoQuestion], right: Sequence[bool], key: Callable[[VideoQuestion], Hashable]
) -> dict[Hashable, float]:
    """Share of right answers among the questions of each `key`, such as `lambda q: (q.aspect, q.format)`."""
    groups: dict[Hashable, list[bool]] = defaultdict(list)
    for question, good in zip(questions, right, strict=True):
        groups[key(question)].append(bool(good))
    return {name: _mean(values) for name, values in groups.items()}


def micro_accuracy(right: Sequence[bool]) -> float:
    """Share of right answers among all questions.

    Raises:
        ValueError: there is no answer.
    """
    return _mean([bool(good) for good in right])


def twin_accuracy(questions: Sequence[VideoQuestion], right: Sequence[bool]) -> float:
    """Share of the groups of two questions or more in which every answer is right.

    Raises:
        ValueError: no group has two questions.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, good in zip(questions, right, strict=True):
        groups[question.group].append(bool(good))
    return _mean([all(group) for group in groups.values() if len(group) > 1])


def shuffle_sensitivity(
    questions: Sequence[VideoQuestion], right: Sequence[bool], right_shuffled: Sequence[bool]
) -> dict[str, float]:
    """Accuracy on videos minus accuracy on the same videos with shuffled frames, by aspect and (`all`) over all.

    Near 0 for a model that ignores the order of frames, and for aspects (colour, shape, count) that do not need it.
    """
    before = accuracy_by(questions, right, lambda question: question.aspect)
    after = accuracy_by(questions, right_shuffled, lambda question: question.aspect)
    drops = {str(aspect): before[aspect] - after[aspect] for aspect in before}
    return drops | {"all": micro_accuracy(right) - micro_accuracy(right_shuffled)}


def _mean(values: Iterable[bool]) -> float:
    listed = list(values)
    if not listed:
        raise ValueError("no answers to average")
    return sum(listed) / len(listed)
