"""Linear probes of a video language model in training, and the targets for its features and states.

`Sight` reads single frames from the features for the language model, colours and shapes by its word embeddings. Three
others read its states: `Motion`, at the video's tokens, the step of a shape since the frame before, and where it is
seen last its motion labels; `Names`, at a name, the attributes of the named shape in the video; `Value`, before an
answer, the truth. So each step towards an answer is supervised. All probes are discarded after training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmalign.shapes.facts import NUMBERS, truth
from mmalign.shapes.video import Sighting, Track
from mmalign.shapes.vlm_lessons import FRAMES, SIZE, Batch
from mmalign.shapes.vlm_model import SIDE
from mmalign.shapes.world import COLOURS, SHAPES

GRID = -(-SIDE // 2)
"""Features a side of each frame for the language model."""
CELL = SIZE / GRID
MOTION_LABELS = {
    "direction": ("left", "right", "up", "down", "still"),
    "motion": ("straight", "bounces", "shakes", "still"),
    "growth": ("grows", "shrinks", "same"),
}
"""Topics whose truth a state must hold where a shape is seen last, and their values."""
PRESENCE = ("always", "appears", "disappears", "hides", "flashes")
VALUES = tuple(
    dict.fromkeys(
        [value for values in MOTION_LABELS.values() for value in values]
        + [*PRESENCE, "equal", *COLOURS, *SHAPES, *NUMBERS]
    )
)
"""Possible truths of any question; of a change of colour the colour after it."""
UNKNOWN = -100
_MIDDLE = (SIZE / 2, SIZE / 2, 6.0)
"""Approximate mean place and radius."""
MOVED, NAMED, KNOWN = 3, 4, 5
"""The number of layers, of six, after which motion, names and truths are read."""
_NAMES = (*COLOURS, *SHAPES)
_SHARPNESS, _NORM = 20.0, 1.5
"""Factor of cosines to words, and the length of a feature; words have length 0.8, and sums of two 1.2."""

Marks = dict[str, list[bool]]
"""Marks by kind: right or wrong for each reading."""


def place_of(seen: Sighting) -> int:
    """The number of the part of the frame that the centre lies in, row by row."""
    return int(seen.y // CELL) * GRID + int(seen.x // CELL)


def sights(tracks: Sequence[tuple[Track, ...]]) -> Float[Tensor, "rows frames places 6"]:
    """The object in each part of each frame.

    Colour and shape as numbers from 1 (0: no centre lies here), the centre's place in the frame, across and down, and
    the radius, in pixels; last, whether there is a centre.
    """
    found = torch.zeros(len(tracks), len(tracks[0][0]), GRID**2, 6)
    for row, video in enumerate(tracks):
        for track in video:
            for frame, seen in enumerate(track):
                if seen:
                    kind = (list(COLOURS).index(seen.colour) + 1, list(SHAPES).index(seen.shape) + 1)
                    found[row, frame, place_of(seen)] = torch.tensor([*kind, seen.x, seen.y, seen.radius, 1.0])
    return found


def steps(tracks: Sequence[tuple[Track, ...]]) -> Float[Tensor, "rows frames places 4"]:
    """How far across and down each shape has come since the frame before and by how much it has grown, in pixels.

    Last, whether there is a centre here of a shape that the frame before shows as well. The short way round.
    """
    found = torch.zeros(len(tracks), len(tracks[0][0]), GRID**2, 4)
    for row, video in enumerate(tracks):
        for track in video:
            for frame, (was, now) in enumerate(zip(track, track[1:], strict=False), 1):
                if was and now:
                    moved = [(b - a + SIZE / 2) % SIZE - SIZE / 2 for a, b in ((was.x, now.x), (was.y, now.y))]
                    found[row, frame, place_of(now)] = torch.tensor([*moved, now.radius - was.radius, 1.0])
    return found


def motion_labels(tracks: Sequence[tuple[Track, ...]]) -> Tensor:
    """Return the label of each shape's motion, topic by topic of `MOTION_LABELS`, `[rows, frames, places, 3]`.

    Labels are numbers of values, at the place and frame where the shape is seen last; `UNKNOWN` everywhere else, and
    where the frames show no answer.
    """
    found = torch.full((len(tracks), len(tracks[0][0]), GRID**2, len(MOTION_LABELS)), UNKNOWN)
    for row, video in enumerate(tracks):
        for track in video:
            if not any(track):
                continue
            frame, seen = [(frame, seen) for frame, seen in enumerate(track) if seen][-1]
            found[row, frame, place_of(seen)] = torch.tensor(_numbers(track, seen.shape, MOTION_LABELS))
    return found


def _numbers(track: Track, shape: str, topics: Mapping[str, tuple[str, ...]]) -> list[int]:
    """The number of the truth among the values of each topic, or `UNKNOWN`."""
    truths = [(values, truth(topic, (shape,), (track,), SIZE)) for topic, values in topics.items()]
    return [values.index(value) if value in values else UNKNOWN for values, value in truths]


def _read_numbers(
    named: Sequence[Tensor], done: Tensor, topics: Mapping[str, tuple[str, ...]], brackets: str
) -> tuple[Tensor, Marks]:
    """Sum over topics of the cross-entropy where the number is known, and by topic the correct readings."""
    loss, marks = torch.zeros(()), Marks()
    for number, (topic, logits) in enumerate(zip(topics, named, strict=True)):
        sure = done[:, number] != UNKNOWN
        if sure.any():
            loss = loss + F.cross_entropy(logits[sure], done[sure, number])
        marks[topic.join(brackets)] = (logits[sure].argmax(1) == done[sure, number]).tolist()
    return loss, marks


class Sight(torch.nn.Module):
    """Readings of one feature: colour and shape by their words, place and size by a linear map.

    The words are the language model's embeddings, as they are, and a feature is read as by the first layer, by its
    direction alone: a correct one lies along the words for its object, and holds little else than these and the place,
    so that the language model can read it like words. Its length is held near that of two words, since a longer one
    would dominate the contributions of the layers.
    """

    words: Tensor

    def __init__(self, words: Float[Tensor, "words width"]) -> None:
        """`words`: the embeddings of the colours, then of the shapes, in the order of the world."""
        super().__init__()
        self.register_buffer("words", F.normalize(words.detach().float(), dim=1))
        self.read = torch.nn.Linear(words.shape[1], 3)
        self.nothing = torch.nn.Parameter(torch.full((2,), _SHARPNESS / 4))

    def forward(self, features: Tensor, seen: Tensor) -> tuple[Tensor, Marks]:
        """Return the loss, and for every shape whether its kind is right, and its place and size to a pixel."""
        features, target = features.flatten(0, -2), seen.flatten(0, -2)
        named = _SHARPNESS * F.normalize(features, dim=1) @ self.words.T
        kinds, there = target[:, :2].long(), target[:, 5] > 0
        losses, right = (features.norm(dim=1) - _NORM) ** 2, torch.ones(len(target), dtype=torch.bool)
        for number, logits in enumerate(named.split([len(COLOURS), len(SHAPES)], 1)):
            logits = torch.cat([self.nothing[number].expand(len(logits), 1), logits], 1)
            losses = losses + F.cross_entropy(logits, kinds[:, number], reduction="none")
            right &= logits.argmax(1) == kinds[:, number]
        where = (target[there, 2:5] - torch.tensor(_MIDDLE)) / 4
        read = self.read(F.rms_norm(features[there], features.shape[1:]))
        loss = losses[there].mean() + losses[~there].mean() + F.mse_loss(read, where)
        near = ((read - where).abs() < 0.25).all(1)
        return loss, {"read": right[there].tolist(), "near": near.tolist()}


class Motion(torch.nn.Module):
    """Linear readings of one state, layer-normed: the step since the frame before, and the motion labels."""

    def __init__(self, width: int) -> None:
        """Make the readings for states of this width."""
        super().__init__()
        self.sizes = (3, *(len(values) for values in MOTION_LABELS.values()))
        self.read = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, sum(self.sizes)))

    def forward(
        self, states: Float[Tensor, "rows tokens width"], tracks: Sequence[tuple[Track, ...]]
    ) -> tuple[Tensor, Marks]:
        """Return the loss, and whether every motion label is right; one state for each place of each frame."""
        step, *named = self.read(states.float()).flatten(0, 1).split(self.sizes, 1)
        target, done = steps(tracks).flatten(0, 2), motion_labels(tracks).flatten(0, 2)
        known = target[:, 3] > 0
        loss, marks = _read_numbers(named, done, MOTION_LABELS, "()")
        return F.mse_loss(step[known], target[known, :3]) + loss, marks


class Value(torch.nn.Module):
    """A linear reading of the state before an answer: the truth, not yet the label that stands for it."""

    def __init__(self, width: int) -> None:
        """Make the reading for states of this width."""
        super().__init__()
        self.read = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, len(VALUES)))

    def forward(
        self, states: Float[Tensor, "lessons width"], lessons: Sequence[tuple[str, str]]
    ) -> tuple[Tensor, Marks]:
        """Return the loss, and for every question, by topic, whether its truth is right; `lessons`: (topic, truth).

        A lesson with an empty truth has none.
        """
        numbers = [VALUES.index(value.split(" to ")[-1]) if value else UNKNOWN for _, value in lessons]
        target, logits = torch.tensor(numbers), self.read(states.float())
        right, marks = (logits.argmax(1) == target).tolist(), defaultdict(list)
        for (topic, value), one in zip(lessons, right, strict=True):
            if value:
                marks[f"[{topic}]"].append(one)
        return F.cross_entropy(logits, target, ignore_index=UNKNOWN), dict(marks)


class Names(torch.nn.Module):
    """Linear readings of the state at a word for a shape or a colour: attributes of the named shape in the video.

    At a shape's name its colour, its motion labels and presence, when it is seen, and how fast it moves; at a colour's
    name the shape that has it.
    Colours are those in which a shape is seen last: of "red to blue" red names nothing.
    """

    def __init__(self, width: int, tokenizer: Any) -> None:
        """Make the readings for states of this width, at the words as this tokenizer writes them."""
        super().__init__()
        tokens = tokenizer([f" {name}" for name in _NAMES], add_special_tokens=False)["input_ids"]
        self.names = {token: name for (token,), name in zip(tokens, _NAMES, strict=True)}
        self.ids = torch.tensor(list(self.names))
        self.labels = {**MOTION_LABELS, "presence": PRESENCE}
        self.sizes = (len(_NAMES) + 1, 3, *(len(values) for values in self.labels.values()))
        self.read = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, sum(self.sizes)))

    def forward(
        self,
        states: Float[Tensor, "rows tokens width"],
        ids: Tensor,
        after: Tensor,
        tracks: Sequence[tuple[Track, ...]],
    ) -> tuple[Tensor, Marks]:
        """Return the loss at the names among the tokens `after` the videos, in questions or answers, and the marks."""
        at = after & torch.isin(ids, self.ids)
        places = at.nonzero().tolist()
        known = [self._of(video) for video in tracks]
        named_facts = [known[row][self.names[int(ids[row, token])]] for row, token in places]
        what, when, *named = self.read(states[at].float()).split(self.sizes, 1)
        other = torch.tensor([one[0] for one in named_facts])
        loss = F.cross_entropy(what, other)
        marks = {"{kind}": [bool(a) for a, b in zip(what.argmax(1) == other, named_facts, strict=True) if b[0]]}
        there = torch.tensor([bool(one[1]) for one in named_facts])
        if there.any():
            loss = loss + F.mse_loss(when[there], torch.tensor([one[1] for one in named_facts if one[1]]))
        read, right = _read_numbers(named, torch.tensor([one[2] for one in named_facts]), self.labels, "{}")
        return loss + read, {**marks, **right}

    def _of(self, video: tuple[Track, ...]) -> dict[str, tuple[int, list[float], list[int]]]:
        """By name: number of the other name or 0; when first and last seen, and speed; numbers of motion labels."""
        nothing: tuple[int, list[float], list[int]] = (0, [], [UNKNOWN] * len(self.labels))
        named_facts = dict.fromkeys(_NAMES, nothing)
        for track in video:
            frames = [frame for frame, seen in enumerate(track) if seen]
            last = next((seen for seen in reversed(track) if seen), None)
            if last is None:
                continue
            moved = steps([(track,)])[0].flatten(0, 1)
            pace = moved[moved[:, 3] > 0, :2].norm(dim=1)
            when = [frames[0] / 4, frames[-1] / 4, float(pace.mean()) if len(pace) else 0.0]
            named_facts[last.shape] = (_NAMES.index(last.colour) + 1, when, _numbers(track, last.shape, self.labels))
            named_facts[last.colour] = (_NAMES.index(last.shape) + 1, *nothing[1:])
        return named_facts


class Probes(torch.nn.Module):
    """The probes of the language model's states, each kind after its number of layers."""

    def __init__(self, width: int, tokenizer: Any) -> None:
        """Make the probes for states of this width."""
        super().__init__()
        self.motion, self.names, self.value = Motion(width), Names(width, tokenizer), Value(width)

    def forward(self, states: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Marks]:
        """Return the sum of the losses, and the marks; `states`: before the first layer and after each."""
        loss, marks = torch.zeros(()), Marks()
        if batch.videos is not None:
            end = int((batch.blocks[0] == 0).sum()) - 1
            moved, right = self.motion(states[MOVED][:, end - FRAMES * GRID**2 : end], batch.tracks)
            named, more = self.names(states[NAMED], batch.ids, batch.blocks > 0, batch.tracks)
            loss, marks = loss + moved + named, {**marks, **right, **more}
        taught = [(one.kind, one.value) for lessons in batch.lessons for one in lessons]
        if taught:
            before = ~batch.answers[:, :-1] & batch.answers[:, 1:]
            known, right = self.value(states[KNOWN][:, :-1][before], taught)
            loss, marks = loss + known, {**marks, **right}
        return loss, marks
