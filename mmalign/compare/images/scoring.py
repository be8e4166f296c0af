"""Score every image or video of a comparison once per reward, as it is stored; remember the score by its content."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmalign.compare.config import RewardEntry
from mmalign.compare.images.media import ImageMedia
from mmalign.compare.images.store import Images
from mmalign.compare.scores import RewardFacts, Scores
from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically
from mmalign.core.progress import track
from mmalign.scoring.checks import check_usable
from mmalign.scoring.chosen import fingerprint_reward
from rewards.combining.on_frames import on_frames

SCORE_CHUNK = 64
"""Images decoded and given to a reward at once; the reward splits them further as its memory requires."""
VIDEO_VALUES = 1 << 26
"""Values of decoded videos after which no other is given to a reward with them."""

_Todo = tuple[str, tuple[Path, str]]
"""The key of a score, and the file and the prompt that it is for."""


def describe_reward(entry: RewardEntry, reward: Any) -> RewardFacts:
    """Return the facts of a loaded reward, checked to score single images or videos.

    Raises:
        UserError: see `check_usable`.
    """
    from rewards import Facts

    facts = Facts.of(reward)
    check_usable(facts, entry.name, facts.modality)
    over = f" Mean over {entry.frames} frames of each video." if entry.frames else ""
    return RewardFacts(
        label=entry.title,
        name=facts.name,
        requested=entry.name,
        version=facts.version,
        summary=facts.summary + over,
        higher_is_better=facts.higher_is_better,
        differentiable=facts.differentiable,
        licence=facts.licence,
        source=facts.source,
        citation=facts.citation,
        derived_from=facts.derived_from,
    )


class ScoreCache:
    """Values cached by the content that they were computed from, in `<cache>/<label>-<hash of the reward>.json`."""

    def __init__(self, entry: RewardEntry, facts: RewardFacts, reward: Any, cache: Path) -> None:
        """Read the file; a damaged one counts as empty."""
        fingerprint = fingerprint_reward(reward, neighbours=True)
        identity: list[Any] = [entry.name, entry.options, facts.version, facts.source, *fingerprint]
        identity += [] if entry.frames is None else [entry.frames]
        digest = hashlib.blake2b(json.dumps(identity, default=str).encode(), digest_size=8).hexdigest()
        safe = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in entry.title)
        self.path = cache / f"{safe}-{digest}.json"
        self.values: dict[str, float] = _read_cache(self.path)

    def save(self) -> None:
        """Write the values."""
        write_atomically(self.path, json.dumps(self.values))


class RewardScorer:
    """One loaded reward with its cache on disk (`<cache>/<reward>-<hash>.json`, image content and prompt -> score)."""

    def __init__(self, entry: RewardEntry, cache: Path) -> None:
        """Load the reward.

        Raises:
            UserError, RewardError: see `check_reward`; or it cannot be loaded.
        """
        from rewards import load_reward

        reward = load_reward(entry.name, **entry.options)
        self._reward = on_frames(reward, entry.frames)
        self._frames = entry.frames
        self.facts = describe_reward(entry, reward)
        self._kept = ScoreCache(entry, self.facts, reward, cache)
        self._cache = self._kept.values

    def score(self, stores: Mapping[str, Images]) -> Scores:
        """Return the score of every image of every store of one kind; only those without a cached score are scored.

        Raises:
            UserError: a score is not a finite number.
        """
        keyed = {name: [(path, text, _content_key(path, text)) for path, text in _items(store)]
                 for name, store in stores.items()}  # fmt: skip
        todo = {key: (path, text) for items in keyed.values() for path, text, key in items if key not in self._cache}
        if todo:
            self._score_new(list(todo.items()), next(iter(stores.values())).media)
        return {
            name: np.array([self._cache[key] for *_, key in items], dtype=np.float64).reshape(
                len(stores[name].prompts), len(stores[name].seeds)
            )
            for name, items in keyed.items()
        }

    def close(self) -> None:
        """Drop the reward's weights: several rewards may not fit into memory together."""
        del self._reward
        gc.collect()

    def _score_new(self, todo: list[_Todo], media: ImageMedia) -> None:
        try:
            with track(len(todo), f"score {self.facts.label}", unit=f"{media.modality}s") as job:
                for chunk, read in self._chunks(todo, media):
                    self._score_chunk(chunk, read)
                    job.advance(len(chunk))
        finally:
            self._kept.save()

    def _chunks(self, todo: list[_Todo], media: ImageMedia) -> Iterator[tuple[list[_Todo], list[Path | Tensor]]]:
        chunk: list[_Todo] = []
        read: list[Path | Tensor] = []
        for one in todo:
            chunk.append(one)
            read.append(media.read(one[1][0], self._frames))
            held = sum(item.numel() for item in read if isinstance(item, Tensor))
            if len(chunk) == SCORE_CHUNK or held >= VIDEO_VALUES:
                yield chunk, read
                chunk, read = [], []
        if chunk:
            yield chunk, read

    def _score_chunk(self, chunk: list[_Todo], media: list[Path | Tensor]) -> None:
        values = self._reward(media, prompts=[text for _, (_, text) in chunk]).tolist()
        for (key, (path, text)), value in zip(chunk, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"reward '{self.facts.label}' gave {value} for {path} ({text!r}), which no mean can hold; "
                    "leave this reward or this prompt out"
                )
            self._cache[key] = value


def score_all(
    entries: Sequence[RewardEntry], stores: Mapping[str, Images], cache: Path
) -> tuple[dict[str, Scores], dict[str, RewardFacts]]:
    """Score all stores by all rewards, one reward in memory at a time; returns label -> scores and label -> facts."""
    scores: dict[str, Scores] = {}
    facts: dict[str, RewardFacts] = {}
    for entry in entries:
        scorer = RewardScorer(entry, cache)
        try:
            scores[entry.title] = scorer.score(stores)
            facts[entry.title] = scorer.facts
        finally:
            scorer.close()
    return scores, facts


def _items(store: Images) -> list[tuple[Path, str]]:
    return [(store.path(index, seed), text) for index, text in enumerate(store.prompts) for seed in store.seeds]


def _content_key(path: Path, prompt: str) -> str:
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16)
    digest.update(b"\0" + prompt.encode())
    return digest.hexdigest()


def _read_cache(path: Path) -> dict[str, float]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
