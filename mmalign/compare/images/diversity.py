"""How much a system's images or videos of one prompt differ: the mean cosine distance of their embeddings.

For prompt p and seed s it is the mean of 1 - cos(e(p, s), e(p, s')) over the other seeds s', in 0 .. 2, with the image
embeddings e of a reward such as clip; that of a video is the mean of those of some frames. More is not better in
itself, since noise is diverse too. The report shows it like a reward, with paired intervals, and it decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.compare.config import RewardEntry
from mmalign.compare.images.media import ImageMedia, check_entry
from mmalign.compare.images.scoring import SCORE_CHUNK, ScoreCache, describe_reward
from mmalign.compare.images.store import Images
from mmalign.compare.scores import RewardFacts, Scores
from mmalign.core.errors import UserError
from mmalign.core.progress import track

Group = tuple[Path, ...]
"""The images of one prompt, one for each seed."""


def check_diversity(entry: RewardEntry, media: ImageMedia) -> None:
    """Check that a reward exists, takes these options and embeds single images, or videos.

    Raises:
        UserError: it embeds none, or an image reward is not told how many frames of a video to take.
        RewardError: it does not exist, cannot be imported, or has no such option.
    """
    from rewards import TwoTowerReward, check_options

    found = check_options(entry.name, entry.options)
    if not issubclass(found, TwoTowerReward):
        raise UserError(
            f"diversity: reward '{entry.name}' embeds no {media.modality}s; choose one that does, such as clip, "
            "pickscore or shapes-clip"
        )
    check_entry(entry, [], media)


def measure_diversity(entry: RewardEntry, stores: Mapping[str, Images], cache: Path) -> tuple[Scores, RewardFacts]:
    """Return the diversity of every image of every store, and its facts for the report.

    Values are cached by the content of all images of a prompt, so only prompts with a new image are embedded.

    Raises:
        UserError, RewardError: see `check_diversity`; or the reward cannot be loaded.
    """
    from rewards import load_reward

    media = next(iter(stores.values())).media
    check_diversity(entry, media)
    reward = load_reward(entry.name, **entry.options)
    facts = replace(
        describe_reward(entry, reward),
        label=entry.title,
        name="diversity",
        requested="diversity",
        summary=f"Mean of 1 − cosine of {entry.name}'s {media.modality} embeddings over the seeds of a prompt.",
        higher_is_better=True,
        neutral=True,
        derived_from=(),
    )
    kept = ScoreCache(entry, facts, reward, cache)
    groups = {name: [_group(store, index) for index in range(len(store.prompts))] for name, store in stores.items()}
    keys = {name: [_keys(group) for group in held] for name, held in groups.items()}
    todo = [
        (group, own)
        for name in stores
        for group, own in zip(groups[name], keys[name], strict=True)
        if any(key not in kept.values for key in own)
    ]
    if todo:
        _measure(reward, todo, kept, entry, media)
    scores = {name: np.array([[kept.values[key] for key in own] for own in held]) for name, held in keys.items()}
    return scores, facts


def mean_distances(embeddings: Float[np.ndarray, "seeds features"]) -> Float[np.ndarray, " seeds"]:
    """Return for each of at least two non-zero embeddings the mean of 1 - cosine to the others."""
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = 1 - units @ units.T
    np.fill_diagonal(distances, 0.0)
    return distances.sum(axis=1) / (len(units) - 1)


def _measure(
    reward: Any, todo: list[tuple[Group, list[str]]], kept: ScoreCache, entry: RewardEntry, media: ImageMedia
) -> None:
    size = max(1, SCORE_CHUNK // len(todo[0][0]))
    try:
        with track(sum(len(group) for group, _ in todo), "measure diversity") as job:
            for start in range(0, len(todo), size):
                chunk = todo[start : start + size]
                paths = [path for group, _ in chunk for path in group]
                embedded = _embed(reward, paths, media, entry.frames).double().numpy(force=True)
                if not (np.linalg.norm(embedded, axis=1) > 0).all():
                    raise UserError(f"diversity: '{entry.name}' embeds an image as nan or zero; choose another reward")
                for (_, keys), rows in zip(chunk, np.split(embedded, len(chunk)), strict=True):
                    kept.values |= dict(zip(keys, mean_distances(rows).tolist(), strict=True))
                job.advance(len(paths))
    finally:
        kept.save()


def _embed(reward: Any, paths: list[Path], media: ImageMedia, frames: int | None) -> Tensor:
    if media.modality == "image":
        embedded: Tensor = reward.embeddings(paths)
        return embedded
    one = (media.read(path, frames) for path in paths)  # videos are large: one at a time
    return torch.stack([reward.embeddings(video if frames else video[None]).mean(0) for video in one])  # type: ignore


def _group(store: Images, index: int) -> Group:
    return tuple(store.path(index, seed) for seed in store.seeds)


def _keys(group: Group) -> list[str]:
    """Return a key for each image: a hash of its content and that of the others, in any order."""
    digests = [hashlib.blake2b(path.read_bytes(), digest_size=16).digest() for path in group]
    together = b"".join(sorted(digests))
    return [hashlib.blake2b(own + together, digest_size=16).hexdigest() for own in digests]
