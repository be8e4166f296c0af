"""Pairs of answers about videos, made by perturbing the model's input: TEMPLE, RRPO and PaMi from one pipeline.

The model answers about a video and about its perturbation; the answer about the video is chosen, that about the
perturbation rejected, both for the video itself. TEMPLE (arXiv 2503.16929) lets it describe videos, or perturbs the
list of its
captions of their clips; RRPO (arXiv 2504.12083) asks questions whose answers can be checked; PaMi-VDPO (arXiv
2504.05810) keeps the answer and makes the perturbed video the rejected side.

What is drawn at random depends on (seed, id, perturbation) alone; the file is written whole or not at all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.io.answer_matching import match_answer
from mmalign.core.io.decode import ALL_FRAMES, Frames
from mmalign.core.io.parquet import atomic_parquet
from mmalign.core.io.video_files import write_video
from mmalign.core.progress import note
from mmalign.core.seeds import derive_seed
from mmalign.data.video.answering import Answerer, Request
from mmalign.data.video.clip_captions import tell_clips
from mmalign.data.video.events import clip_lengths
from mmalign.data.video.items import VideoItem
from mmalign.data.video.operators import Effect, get_operator
from mmalign.data.video.perturbations import Perturbation
from mmalign.data.video.reading import VideoReader
from mmalign.data.vlm_pairs import MOST_NAMED
from pipelines.errors import PipelineError

AboutT = TypeVar("AboutT")
_TEXT = pa.string()
_COLUMNS = [("id", _TEXT), ("prompt", _TEXT), ("chosen", _TEXT), ("rejected", _TEXT), ("video", _TEXT),
            ("fps", pa.float64()), ("aspect", _TEXT), ("difficulty", pa.int32()), ("operator", _TEXT)]  # fmt: skip

_OWN_VIDEO = [("rejected_video", _TEXT), ("rejected_fps", pa.float64())]

REASONS = {
    "events": "videos with too few events",
    "unknown": "questions whose right answer is unknown",
    "unanswered": "questions that the model gets wrong, or answers in words that cannot be rated",
    "keeps": "perturbations that leave the answer true",
    "depends": "perturbations that may leave the answer true",
    "empty": "empty answers",
    "equal": "equal answers",
    "substring": "chosen answers that are part of the rejected one",
    "length": "answers whose lengths differ too much",
    "right": "rejected answers that are right, or may be",
    "effect": "perturbations that hardly move the model's preference",
    "mirror": "pairs without an opposite",
    "failed": "videos or perturbations of them that cannot be read, made or shown",
}
"""Reasons for leaving out a pair, in the order of the checks."""


@dataclass(frozen=True)
class VideoPairSettings:
    """Settings for making pairs.

    questions: ask the source's questions instead of for descriptions. captions: perturb the captions of clips instead
    of frames, composed by the `model` or simply `join`ed. chosen: the `model`'s answer, or the `truth`. rejected:
    `answers` to the perturbed video, the perturbed `videos` with the chosen answer, or `both`. min_events: leave out
    videos with fewer. length_ratio: leave out descriptions of which one is more than this many times as long as the
    other, or (where frames were dropped) the chosen one not longer; None keeps them. min_effect: leave out
    perturbations that lower log p(chosen) - log p(rejected) by less, in nats. mirrored: keep a pair only with its
    opposite, the same question about another video with both answers swapped.
    """

    perturbations: tuple[Perturbation, ...]
    questions: bool = False
    captions: Literal["", "model", "join"] = ""
    chosen: Literal["model", "truth"] = "model"
    rejected: Literal["answers", "videos", "both"] = "answers"
    min_events: int = 1
    length_ratio: float | None = 1.5
    min_effect: float | None = None
    mirrored: bool = False
    frames: Frames = ALL_FRAMES
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            UserError: they do.
        """
        if self.captions:
            changes = [name for one in self.perturbations for name in one.names if not get_operator(name).temporal]
            if changes:
                raise UserError(f"operator '{changes[0]}' changes frames, and captions have none; leave it out")
            if self.questions or self.rejected != "answers":
                raise UserError("captions of clips become descriptions; use --mode answers, --rejected answers")
            if self.min_events < 2:
                raise UserError(f"min_events {self.min_events}: one caption cannot be re-ordered; use 2 or more")
        if self.mirrored and not (self.questions and self.rejected == "answers"):
            raise UserError(
                "only answers to questions can be mirrored; use --mode questions and --rejected answers, or omit it"
            )
        if self.min_effect is not None and (self.captions or self.rejected != "answers"):
            raise UserError("min_effect needs answers to compare; use --rejected answers, and no captions of clips")
        if self.chosen == "truth" and not self.questions:
            raise UserError("only questions have a known right answer; use --mode questions, or --chosen model")

    @property
    def asks_rejected(self) -> bool:
        """Whether the model is asked about perturbed videos."""
        return self.rejected != "videos"


@dataclass
class VideoPairCounts:
    """Counts: pairs by perturbation, and candidates left out, by `REASONS`."""

    pairs: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return the counts as one line."""
        made = ", ".join(f"{count} {name}" for name, count in self.pairs.items()) or "none"
        left = ", ".join(f"{self.left_out[key]} {text}" for key, text in REASONS.items() if self.left_out[key])
        return f"{self.pairs.total()} pairs ({made}); left out: {left or 'nothing'}"


@dataclass(frozen=True)
class _Candidate:
    """A candidate for a pair: the question, the perturbation, and the answer about the original video."""

    item: VideoItem
    perturbation: Perturbation
    chosen: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.item.id}/{self.perturbation}"


def write_video_pairs(
    items: Sequence[VideoItem],
    out: Path,
    settings: VideoPairSettings,
    answerer: Answerer | None = None,
    *,
    source: str = "",
) -> VideoPairCounts:
    """Make pairs of answers about videos and write them to `out`, in the columns of `mmalign.data.vlm_pairs`.

    Perturbed videos, if they are a rejected side, go to `<out without suffix>-videos/`. The model is not needed if the
    truth is chosen and videos are rejected.

    Raises:
        UserError: no pair is left, no model where one is needed, or a video that cannot be read or perturbed.
    """
    if answerer is None and (settings.asks_rejected or settings.chosen == "model"):
        raise UserError("no model to answer the questions; give one, or use --chosen truth and --rejected videos")
    counts = VideoPairCounts()
    pipeline = _Pipeline(settings, answerer, VideoReader(settings.frames), counts)
    pairs = pipeline.from_captions(items) if settings.captions else pipeline.from_videos(items)
    schema = pa.schema([*_COLUMNS, *([] if settings.rejected == "answers" else _OWN_VIDEO)])
    made_by = {
        "perturbed": source,
        "model": answerer.model if answerer else None,
        "fingerprint": answerer.fingerprint if answerer else None,
        "mode": "questions" if settings.questions else "answers",
        "seed": settings.seed,
    }
    with atomic_parquet(out, schema, made_by) as writer:
        kept = []
        for candidate, rejected in pairs:
            reason = refuse(candidate.item, candidate.perturbation, candidate.chosen, rejected, settings)
            if reason is not None:
                counts.left_out[reason] += 1
            else:
                kept.append((candidate, rejected))
        if settings.min_effect is not None:
            strong = pipeline.with_effect(kept, settings.min_effect)
            counts.left_out["effect"] = len(kept) - len(strong)
            kept = strong
        if settings.mirrored:
            preferences = [(one.item.prompt, one.chosen, rejected) for one, rejected in kept]
            with_opposite = mirrored(preferences, settings.seed)
            counts.left_out["mirror"] = len(kept) - len(with_opposite)
            kept = [kept[index] for index in with_opposite]
        for candidate, rejected in kept:
            with pipeline.one_item():
                writer.add(pipeline.row(candidate, rejected, out))
                counts.pairs[str(candidate.perturbation)] += 1
        if not counts.pairs:
            raise UserError(f"{source or out}: no pair is left to write ({counts})")
    return counts


def refuse(
    item: VideoItem, perturbation: Perturbation, chosen: str, rejected: str, settings: VideoPairSettings
) -> str | None:
    """Return the reason why two answers are no pair, one of `REASONS`, or None if they are one.

    Lengths are those of TEMPLE, in characters, and like its substrings they only concern descriptions.
    """
    if not chosen.strip() or not rejected.strip():
        return "empty"
    if not settings.asks_rejected:
        return None
    if chosen.strip() == rejected.strip():
        return "equal"
    if settings.questions:
        same = match_answer(rejected, chosen)
        if same:
            return "equal"
        wrong = same is False if item.answer is None else item.wrong(rejected)
        return None if wrong else "right"
    if chosen in rejected:
        return "substring"
    if settings.length_ratio is None:
        return None
    shorter, longer = sorted((len(chosen), len(rejected)))
    shrunk = any(get_operator(name).name == "drop" for name in perturbation.names)
    return "length" if (len(chosen) <= len(rejected) if shrunk else longer > settings.length_ratio * shorter) else None


def mirrored(preferences: Sequence[tuple[str, str, str]], seed: int = 0) -> list[int]:
    """Return which of (prompt, chosen, rejected) to keep so that each comes as often as with both answers swapped.

    The pairs to leave out are drawn from `seed`. A model that uses the text alone is then right about half of the
    pairs: there is no language prior to learn, or to overcorrect.
    """
    found: dict[tuple[str, str, str], list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(preferences)).tolist():
        prompt, chosen, rejected = preferences[index]
        found.setdefault((prompt, chosen.strip(), rejected.strip()), []).append(index)
    return sorted(
        index
        for (prompt, chosen, rejected), own in found.items()
        for index in own[: len(found.get((prompt, rejected, chosen), ()))]
    )


class _Pipeline:
    """The steps that need videos or the model."""

    def __init__(
        self, settings: VideoPairSettings, answerer: Answerer | None, reader: VideoReader, counts: VideoPairCounts
    ) -> None:
        self.settings, self.answerer, self.reader, self.counts = settings, answerer, reader, counts

    def from_videos(self, items: Sequence[VideoItem]) -> Iterator[tuple[_Candidate, str]]:
        """Yield candidates with the answer to the perturbed video (or the chosen one if none is shown)."""
        chosen = self._answers([item for item in items if self._eventful(item)])
        candidates = [one for item, answer in chosen for one in self._candidates(item, answer)]
        if not self.settings.asks_rejected:
            yield from ((one, one.chosen) for one in candidates)
            return
        yield from self._ask([(one, self._request(one.item, one)) for one in candidates], "answer perturbed videos")

    def from_captions(self, items: Sequence[VideoItem]) -> Iterator[tuple[_Candidate, str]]:
        """Yield candidates whose answers compose the captions of clips in order, and re-ordered."""
        kept = [item for item in items if self._eventful(item)]
        assert self.answerer is not None
        orders = [
            [
                list(range(count)),
                *(one.apply(list(range(count)), self._seed(item, one)) for one in self._perturbations),
            ]
            for item in kept
            for count in [len(clip_lengths(self.reader.states(item)))]
        ]
        compose = self.settings.captions == "model"
        composed = tell_clips(kept, orders, self.reader, self.answerer, self._answer_seed, compose=compose)
        for item, (chosen, *others) in zip(kept, composed, strict=True):
            for perturbation, rejected in zip(self._perturbations, others, strict=True):
                yield _Candidate(item, perturbation, chosen, self._seed(item, perturbation)), rejected

    def with_effect(self, pairs: Sequence[tuple[_Candidate, str]], least: float) -> list[tuple[_Candidate, str]]:
        """Return the pairs whose perturbation lowers the model's preference for the chosen answer by `least` nats."""
        assert self.answerer is not None
        clean = [(self._request(one.item), one.chosen, rejected) for one, rejected in pairs]
        perturbed = [(self._request(one.item, one), one.chosen, rejected) for one, rejected in pairs]
        before = self.answerer.margins(clean, "weigh answers to videos")
        after = self.answerer.margins(perturbed, "weigh answers to perturbed videos")
        return [pair for pair, a, b in zip(pairs, before, after, strict=True) if a - b >= least]

    def row(self, candidate: _Candidate, rejected: str, out: Path) -> dict[str, Any]:
        """Return the row of a pair; its perturbed video is written first, if it is one side of it."""
        item = candidate.item
        row = {
            "id": candidate.id,
            "prompt": item.prompt,
            "chosen": candidate.chosen,
            "rejected": rejected,
            "video": os.path.relpath(item.file.resolve(), out.parent.resolve()),
            "fps": item.fps,
            "aspect": item.aspect,
            "difficulty": candidate.perturbation.ratio,
            "operator": candidate.perturbation.name,
        }
        if self.settings.rejected != "answers":
            name = f"{out.stem}-videos/{candidate.id.replace('/', '_')}.mkv"
            shown = self.reader.show(item, candidate.perturbation, candidate.seed)
            write_video(out.parent / name, shown.media[0], shown.fps)
            row |= {"rejected_video": name, "rejected_fps": shown.fps}
        return row

    @property
    def _perturbations(self) -> tuple[Perturbation, ...]:
        return self.settings.perturbations

    def _eventful(self, item: VideoItem) -> bool:
        least = self.settings.min_events
        if least <= 1:
            return True
        with self.one_item():
            enough = len(set(self.reader.states(item))) >= least
            self.counts.left_out["events"] += not enough
            return enough
        return False

    def _answers(self, items: list[VideoItem]) -> list[tuple[VideoItem, str]]:
        """Return the items with their chosen answers, without those known to be wrong."""
        if self.settings.chosen == "truth":
            known = [(item, item.answer) for item in items if item.answer]
            self.counts.left_out["unknown"] += len(items) - len(known)
            return known
        asked = self._ask([(item, self._request(item)) for item in items], "answer videos")
        kept = [(item, answer) for item, answer in asked if item.answer is None or item.right(answer)]
        self.counts.left_out["unanswered"] += len(asked) - len(kept)
        return kept

    def _candidates(self, item: VideoItem, chosen: str) -> Iterator[_Candidate]:
        # A wrong answer may be rejected whether or not the truth changed. With changed truths alone, no answer such as
        # "it does not move" would ever be chosen, and training would learn to avoid it.
        found_out = item.answer is not None and self.settings.rejected == "answers"
        for perturbation in self._perturbations:
            seed = self._seed(item, perturbation)
            if self.settings.questions and not found_out:
                fate = perturbation.fate(item, self.reader.count(item), seed)
                if fate is Effect.KEEPS or (fate is Effect.DEPENDS and self.settings.rejected != "answers"):
                    self.counts.left_out["keeps" if fate is Effect.KEEPS else "depends"] += 1
                    continue
            yield _Candidate(item, perturbation, chosen, seed)

    def _ask(self, asked: list[tuple[AboutT, Request]], label: str) -> list[tuple[AboutT, str]]:
        """Return the answers to requests, each with the item or candidate that it is about, without failed ones."""
        assert self.answerer is not None
        failed: dict[str, str] = {}
        answers = self.answerer.answer([request for _, request in asked], label, failed=failed)
        for reason in failed.values():
            self._leave_out(reason)
        both = zip(asked, answers, strict=True)
        return [(about, answer) for (about, request), answer in both if request.key not in failed]

    @contextmanager
    def one_item(self) -> Iterator[None]:
        """Context of the work on one item, which is named and counted if that fails."""
        try:
            yield
        except (UserError, PipelineError) as error:
            self._leave_out(str(error))

    def _leave_out(self, reason: str) -> None:
        self.counts.left_out["failed"] += 1
        if self.counts.left_out["failed"] <= MOST_NAMED:
            note(f"left out: {reason}")

    def _request(self, item: VideoItem, candidate: _Candidate | None = None) -> Request:
        """Return the request for the model about a video, or about its perturbation."""
        if candidate is None:
            show, media_id = partial(self.reader.show, item), self.reader.media_id(item)
            return Request(item.prompt, media_id, show, self._answer_seed(item.id))
        perturbation, seed = candidate.perturbation, candidate.seed
        media_id = f"{self.reader.media_id(item)}+{perturbation}+{seed}"
        show = partial(self.reader.show, item, perturbation, seed)
        return Request(item.prompt, media_id, show, self._answer_seed(candidate.id))

    def _seed(self, item: VideoItem, perturbation: Perturbation) -> int:
        return derive_seed(self.settings.seed, "perturb", item.id, str(perturbation))

    def _answer_seed(self, name: str) -> int | None:
        by_chance = self.answerer is not None and self.answerer.decoding.temperature > 0
        return derive_seed(self.settings.seed, "answer", name) if by_chance else None
