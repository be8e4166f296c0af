"""What the Shapes video language model is taught: videos, and what is asked and answered about each.

Videos are drawn as they are needed, three milliseconds each, so no video is seen twice. The lessons of one video share
one row of tokens: the video first, then question after question, each of which sees the video and itself alone, as if
it had been asked by itself. That is half the tokens of a row for each question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from mmalign.data.video_questions import INSTRUCTIONS
from mmalign.shapes.facts import NUMBERS, STATIC, TOPICS, truth
from mmalign.shapes.questions import ask
from mmalign.shapes.twins import Family, sample_families
from mmalign.shapes.video import Track, draw, unroll
from mmalign.shapes.wording import QUESTIONS, say
from mmalign.shapes.world import COLOURS, SHAPES

DESCRIBE = ("Describe the video.", "What can be seen in the video?", "What happens in the video?")
SIZE, FRAMES = 48, 8
CURRICULUM = (*TOPICS, *STATIC)
"""Topics of families, in turn: static ones twice."""

_EVENTS = (("recolouring", "same"), ("growth", "same"), ("presence", "always"))
"""Topics that a description tells of, unless nothing happens; and how a shape moves, if none of them does."""


class Lesson(NamedTuple):
    """What is asked about a video, the answer, and whether it takes time to tell (None: a description)."""

    prompt: str
    completion: str
    temporal: bool | None


@dataclass(frozen=True)
class Taught:
    """One video, its tracks and its lessons."""

    video: UInt8[Tensor, "frames 3 size size"]
    tracks: tuple[Track, ...]
    lessons: tuple[Lesson, ...]


def describe(tracks: Sequence[Track], size: int) -> str:
    """Say how many shapes there are and what each does, in order of appearance, then of the alphabet."""
    number = truth("count", (), tracks, size)
    told = [say("count", str(number), (), ()).statement]
    first = {next(s for s in track if s): track.index(next(s for s in track if s)) for track in tracks if any(track)}
    for seen in sorted(first, key=lambda s: (first[s], s.colour, s.shape)):
        told.append(_deed(seen.shape, f"the {seen.colour} {seen.shape}", tracks, size))
    return " ".join(told)


def _deed(shape: str, name: str, tracks: Sequence[Track], size: int) -> str:
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
    """All lessons about each video of a family: the questions of :func:`ask`, and a description."""
    lessons: list[list[Lesson]] = [[] for _ in family.scenes]
    for question in ask(family, name, seed):
        answer = question.answer
        if question.format == "captioning":
            value = family.values[question.member]
            answer = say(question.topic, value, question.subject, question.names).statement
        lessons[question.member].append(Lesson(question.prompt, answer, question.topic not in STATIC))
    request = DESCRIBE[sum(name.encode()) % len(DESCRIBE)]
    for scene, told in zip(family.scenes, lessons, strict=True):
        told.append(Lesson(request, describe(unroll(scene), scene.size), None))
    return lessons


class Lessons:
    """An endless, seeded stream of rows for training."""

    def __init__(self, tokenizer: Any, seed: int, per_video: int) -> None:
        """`per_video`: how many of a video's lessons share its row, drawn by chance; the description always does."""
        self.tokenizer, self.per_video = tokenizer, per_video
        self._families = sample_families(10**9, seed=seed, topics=CURRICULUM, frames=FRAMES, size=SIZE)
        self._rng, self._waiting, self._seed, self._made = np.random.default_rng([seed, 1]), [], seed, 0

    def batch(self, videos: int) -> Batch:
        rows = []
        while len(self._waiting) < videos:
            family = next(self._families)
            self._made += 1
            lessons = lessons_of(family, f"train-{self._made}", self._seed)
            self._waiting += list(zip(family.scenes, lessons, strict=True))
        now, self._waiting = self._waiting[:videos], self._waiting[videos:]
        for scene, lessons in now:
            chosen = self._rng.permutation(len(lessons) - 1)[: self.per_video - 1]
            rows.append((scene, [lessons[i] for i in chosen] + lessons[-1:]))
        return self.pack(rows)

    @property
    def head(self) -> list[int]:
        t = self.tokenizer
        places = FRAMES * 9 + 1
        return [t.convert_tokens_to_ids("<|user|>"), *[t.video_token_id] * places]

    def pack(self, rows: Any) -> Batch:
        t = self.tokenizer
        user, assistant, end = t.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
        head = self.head
        made = []
        for scene, lessons in rows:
            ids, pos, block, target = list(head), list(range(len(head))), [0] * len(head), [False] * len(head)
            for n, lesson in enumerate(lessons, 1):
                q = [*self.ids(lesson.prompt), end, assistant]
                a = [*self.ids(lesson.completion), end]
                ids += q + a
                pos += range(len(head), len(head) + len(q) + len(a))
                block += [n] * (len(q) + len(a))
                target += [False] * len(q) + [True] * len(a)
            made.append((ids, pos, block, target))
        L = max(len(m[0]) for m in made)
        def pad(k, v):
            return torch.tensor([m[k] + [v] * (L - len(m[k])) for m in made])
        ids, pos, block, target = pad(0, t.pad_token_id), pad(1, 0), pad(2, -1), pad(3, False)
        mask = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        mask &= torch.ones(L, L, dtype=torch.bool).tril()
        video = torch.stack([draw(unroll(s), s.background, s.size) for s, _ in rows])
        return Batch(video, ids, pos, mask[:, None], target, block, [s for s, _ in rows])

    def ids(self, text: str) -> list[int]:
        return _ids(self.tokenizer, text)


@lru_cache(maxsize=100_000)
def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Batch(NamedTuple):
    video: Any
    ids: Any
    pos: Any
    mask: Any
    target: Any
    block: Any
    scenes: Any
