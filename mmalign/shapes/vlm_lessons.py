"""Training data of the Shapes video language model: videos with questions and answers.

Videos are drawn as they are needed, three milliseconds each, so no video is seen twice. The lessons of one video share
one row of tokens: the video first, then question after question, each of which attends to the video and itself alone,
as if it were alone in the row. That is half the tokens of a row for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from mmalign.core.io.video_questions import STATIC, TOPICS
from mmalign.shapes.facts import truth
from mmalign.shapes.questions import ask
from mmalign.shapes.twins import Family, sample_families
from mmalign.shapes.video import Track, VideoScene, draw, render, unroll
from mmalign.shapes.wording import say

DESCRIBE = ("Describe the video.", "What can be seen in the video?", "What happens in the video?")
SIZE, FRAMES = 48, 8
LONGEST = 60
"""Tokens of a long question."""
CURRICULUM = (*TOPICS, *STATIC)
"""Topics of families, in turn: static ones twice."""

_EVENTS = (("recolouring", "same"), ("growth", "same"), ("presence", "always"))
"""Topics of a description, unless nothing happens; and the manner of motion if none applies."""


class Lesson(NamedTuple):
    """A question about a video, the answer, and the kind of question: a topic, or described.

    unseen: the answer without the video, the first option, or yes; of descriptions None.
    value, statement: the truth, and the sentence that states it; of descriptions empty.
    """

    prompt: str
    completion: str
    kind: str
    unseen: str | None = None
    value: str = ""
    statement: str = ""


def describe(tracks: Sequence[Track], size: int) -> str:
    """Describe the number of shapes and the motion of each, in order of appearance, then of the alphabet."""
    number = truth("count", (), tracks, size)
    sentences = [say("count", str(number), (), ()).statement]
    first = {next(s for s in track if s): track.index(next(s for s in track if s)) for track in tracks if any(track)}
    for seen in sorted(first, key=lambda s: (first[s], s.colour, s.shape)):
        sentences.append(_statement_of(seen.shape, f"the {seen.colour} {seen.shape}", tracks, size))
    return " ".join(sentences)


def _statement_of(shape: str, name: str, tracks: Sequence[Track], size: int) -> str:
    subject, names = (shape,), (name,)
    for topic, nothing in _EVENTS:
        value = truth(topic, subject, tracks, size)
        if value not in (None, nothing):
            return say(topic, str(value), subject, names).statement
    manner = truth("motion", subject, tracks, size)
    topic = "direction" if manner in ("straight", "still") else "motion"
    value = truth(topic, subject, tracks, size)
    return say(topic, str(value), subject, names).statement


def lessons_of(family: Family, name: str, seed: int = 0) -> list[list[Lesson]]:
    """All lessons about each video of a family: the questions of :func:`ask`, answered by labels, and a description.

    The label alone: it comes first, so a model that also writes the option's words would be trained mostly on words
    that follow from the label, and would learn the choice late.
    """
    lessons: list[list[Lesson]] = [[] for _ in family.scenes]
    for question in ask(family, name, seed):
        unseen = "yes" if question.format == "yes_no" else question.stating(question.answers[0][0])
        value = family.values[question.member]
        statement = say(question.topic, value, question.subject, question.names).statement
        lesson = Lesson(question.prompt, question.label, question.topic, unseen, value, statement)
        lessons[question.member].append(lesson)
    request = DESCRIBE[sum(name.encode()) % len(DESCRIBE)]
    for scene, own in zip(family.scenes, lessons, strict=True):
        own.append(Lesson(request, describe(unroll(scene), scene.size), "described"))
    return lessons


class Batch(NamedTuple):
    """Rows for training: a video each, its lessons in blocks after it, and which tokens are answers."""

    videos: UInt8[Tensor, "rows frames 3 size size"] | None
    """None where each question comes after a hint, the statement that answers it, instead."""
    ids: Int[Tensor, "rows length"]
    positions: Int[Tensor, "rows length"]
    sees: Bool[Tensor, "rows 1 length length"]
    answers: Bool[Tensor, "rows length"]
    blocks: Int[Tensor, "rows length"]
    """0 for the video, 1, 2, ... for lessons, -1 for padding."""
    lessons: list[list[Lesson]]
    """Of each row."""
    tracks: list[tuple[Track, ...]]
    """Of each row's video."""


class Lessons:
    """An endless stream of training rows; the same tokenizer, seed and calls always give the same."""

    def __init__(self, tokenizer: Any, seed: int, frame_tokens: int, prior: float = 0.0) -> None:
        """`frame_tokens`: how many tokens stand for one frame; one more ends the video.

        prior: this share of temporal questions is answered without the video.
        """
        self._families = enumerate(sample_families(10**9, seed=seed, topics=CURRICULUM, frames=FRAMES, size=SIZE))
        self._rng, self._seed, self._prior = np.random.default_rng([seed, 1]), seed, prior
        self._encode = lru_cache(100_000)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self._pad = tokenizer.pad_token_id
        # The chat format gives the text before a question, after it, and (the end token) after its answer.
        turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
        chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, after = chat.split(tokenizer.video_token + "?")
        places = [tokenizer.video_token_id] * (FRAMES * frame_tokens + 1)
        self._user = self._encode(before)
        self._before = [*self._user, *places]
        self._after, self._end = self._encode(after), [tokenizer.eos_token_id]

    def frames(self, count: int) -> tuple[UInt8[Tensor, "count 1 3 size size"], list[tuple[Track, ...]]]:
        """One frame, drawn by chance, of one video each of the next families, and its tracks of that one frame."""
        videos, tracks = [], []
        for _, family in islice(self._families, count):
            scene = family.scenes[int(self._rng.integers(len(family.scenes)))]
            frame = int(self._rng.integers(scene.frames))
            tracks.append(tuple(track[frame : frame + 1] for track in unroll(scene)))
            videos.append(draw(tracks[-1], scene.background, scene.size))
        return torch.stack(videos), tracks

    def names_after_videos(self, rows: int, names: Sequence[int]) -> Batch:
        """One video each of the next families, and after it every one of these tokens, each by itself.

        Those of a video stand as far behind it as any token of a question could, by chance.
        """
        families = [family for _, family in islice(self._families, rows)]
        scenes = [family.scenes[int(self._rng.integers(len(family.scenes)))] for family in families]
        parts: list[tuple[list[int], list[int]]] = [([name], []) for name in names]
        gaps = self._rng.integers(0, LONGEST, rows)
        laid = [self._lay_out(self._before, parts, int(gap)) for gap in gaps]
        videos, tracks = torch.stack([render(scene) for scene in scenes]), [unroll(scene) for scene in scenes]
        return Batch(videos, *self._pack(laid), [[] for _ in scenes], tracks)

    def batch(self, rows: int, most: int, *, with_hint: bool = False) -> Batch:
        """The next videos, by twos of a family, each with its description and, by chance, `most` of its questions.

        with_hint: questions alone, each after the statement that answers it; no video is drawn. (The space between
        them makes the question's first word fall into its bytes: the tokenizer knows it at the start alone.)
        """
        taken: list[tuple[VideoScene, list[Lesson]]] = []
        for number, family in islice(self._families, -(-rows // 2)):
            asked = lessons_of(family, f"train-{number}", self._seed)
            if self._prior:
                asked = [[self._guess(lesson) for lesson in row] for row in asked]
            members = self._rng.permutation(len(asked))[: min(2, rows - len(taken))]
            taken += [(family.scenes[member], asked[member]) for member in members]
        chosen = [[*(asked[i] for i in self._rng.permutation(len(asked) - 1)[:most]), asked[-1]] for _, asked in taken]
        if with_hint:
            chosen = [[one._replace(prompt=f"{one.statement} {one.prompt}") for one in row[:-1]] for row in chosen]
        tracks = [unroll(scene) for scene, _ in taken]
        videos = None if with_hint else torch.stack([render(scene) for scene, _ in taken])
        before = self._user if with_hint else self._before
        laid = [self._lay_out(before, [self._tokens(lesson) for lesson in row]) for row in chosen]
        return Batch(videos, *self._pack(laid), chosen, tracks)

    def _guess(self, lesson: Lesson) -> Lesson:
        """Replace true answers by those without the video, by chance."""
        if lesson.kind in STATIC or lesson.unseen is None or self._rng.random() >= self._prior:
            return lesson
        return lesson._replace(completion=lesson.unseen)

    def _tokens(self, lesson: Lesson) -> tuple[list[int], list[int]]:
        return [*self._encode(lesson.prompt), *self._after], [*self._encode(lesson.completion), *self._end]

    def _pack(self, laid: Sequence[tuple[list[int], ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Ids, positions, attention masks, answer masks and blocks of rows padded on the right."""
        length = max(len(row[0]) for row in laid)
        padding = (self._pad, 0, -1, 0)
        ids, positions, blocks, answers = (
            torch.tensor([row[part] + [empty] * (length - len(row[part])) for row in laid])
            for part, empty in enumerate(padding)
        )
        sees = (blocks[:, None] == 0) | (blocks[:, None] == blocks[:, :, None])
        sees &= torch.ones(length, length, dtype=torch.bool).tril()
        return ids, positions, sees[:, None], answers.bool(), blocks

    @staticmethod
    def _lay_out(
        before: list[int], parts: Sequence[tuple[list[int], list[int]]], gap: int = 0
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, positions, blocks and whether it is an answer; `parts`: question and answer in tokens."""
        start = len(before)
        ids, positions, blocks, answers = list(before), list(range(start)), [0] * start, [0] * start
        for block, (asked, said) in enumerate(parts, 1):
            ids += asked + said
            positions += range(start + gap, start + gap + len(asked) + len(said))
            blocks += [block] * (len(asked) + len(said))
            answers += [0] * len(asked) + [1] * len(said)
        return ids, positions, blocks, answers
