"""Score the samples of a prompt by comparing them with each other: the share of the votes that each gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.io.items import Item
from mmalign.scoring.choice import TIE_TOLERANCE, WeightedReward
from mmalign.scoring.engine import BATCH_PIXELS, Scored, decode_ahead


def vote_shares(votes: Float[Tensor, "size size"]) -> Float[Tensor, " size"]:
    """Return the mean share of the votes that each sample gets against the others, in [0, 1].

    `votes[i, j]` in [-1, 1] says by how much i won against j; NaN is a tie. The diagonal is not read. Of two samples
    the difference of the shares is the vote margin.

    >>> vote_shares(torch.tensor([[0.0, 1.0, 0.5], [-1.0, 0.0, float("nan")], [-0.5, float("nan"), 0.0]]))
    tensor([0.8750, 0.2500, 0.3750])
    """
    shares = (1 + votes.nan_to_num(0.0)) / 2
    return (shares.sum(1) - shares.diagonal()) / (len(votes) - 1)


def score_by_votes(
    items: Iterable[Item], rewards: Sequence[WeightedReward], *, modality: str = "image", ahead: int = 8
) -> Iterator[Scored]:
    """Yield every item with its vote shares among those of its group (`item.extra.group`), in order.

    A reward whose class says `compares_pairs = True` is asked about each pair, and asks in both orders itself; of
    another one the higher score wins, scores within `TIE_TOLERANCE` tie, and one that is not finite leaves the group
    without shares (NaN).
    A group with an item that cannot be read is not compared: its shares are 1/2.
    For a reward of which less is better the share is negative, so that the signed sum counts votes. In memory are the
    levels of a group, and as floats no more than `BATCH_PIXELS`, or one pair.

    Raises:
        RewardError: a reward refuses an item, or gives no answer.
    """
    decoded = decode_ahead(items, modality, ahead)
    for _, group in groupby(decoded, key=lambda one: one[0].extra.group):
        members, media = zip(*group, strict=True)
        comparable = len(members) > 1 and all(isinstance(one, Tensor) for one in media)
        equal = torch.full((len(members),), 0.5)
        shares = {one.name: _shares(one, media, members[0].prompt) if comparable else equal for one in rewards}
        for place, (item, one) in enumerate(zip(members, media, strict=True)):
            error = one if isinstance(one, str) else ""
            yield Scored(item, {name: float(found[place]) for name, found in shares.items()}, error)


def _shares(entry: WeightedReward, media: Sequence[Tensor], prompt: str | None) -> Tensor:
    compares = getattr(entry.reward, "compares_pairs", False)
    shares = vote_shares(_judged(entry.reward, media, prompt)) if compares else _scored(entry.reward, media, prompt)
    return shares if entry.reward.higher_is_better else -shares


def _judged(reward: Any, media: Sequence[Tensor], prompt: str | None) -> Float[Tensor, "size size"]:
    size = len(media)
    first, second = torch.triu_indices(size, size, offset=1).tolist()
    found = [
        reward.pairwise(_levels(reward, media, first[rows]), _levels(reward, media, second[rows]), **asked)
        for rows, asked in _batches(reward, media, len(first), 2, prompt)
    ]
    votes = torch.zeros(size, size)
    votes[first, second] = torch.cat([one.float().cpu() for one in found]).clamp(-1, 1)
    return votes - votes.T


def _scored(reward: Any, media: Sequence[Tensor], prompt: str | None) -> Float[Tensor, " size"]:
    found = [
        reward(_levels(reward, media, range(len(media))[rows]), **asked)
        for rows, asked in _batches(reward, media, len(media), 1, prompt)
    ]
    scores = torch.cat([one.double().cpu() for one in found])
    own, other = scores.unsqueeze(1), scores.unsqueeze(0)
    wins = (own - other).sign() * (1 if reward.higher_is_better else -1)
    ties = torch.isclose(own, other, rtol=TIE_TOLERANCE, atol=TIE_TOLERANCE)
    return vote_shares(wins.masked_fill(ties, 0.0)).where(scores.isfinite().all(), math.nan)


def _batches(
    reward: Any, media: Sequence[Tensor], count: int, sides: int, prompt: str | None
) -> Iterator[tuple[slice, dict[str, list[str]]]]:
    """Yield the rows of a call, of `count` in all with so many media in each, and the prompts that it is given."""
    pixels = sides * max(one.numel() for one in media) // 3
    most = max(1, min(reward.batch_size, BATCH_PIXELS // pixels))
    for start in range(0, count, most):
        stop = min(start + most, count)
        asked = {"prompts": [prompt or ""] * (stop - start)} if "prompts" in reward.needs else {}
        yield slice(start, stop), asked


def _levels(reward: Any, media: Sequence[Tensor], rows: Sequence[int]) -> Tensor | list[Tensor]:
    """Return media in [0, 1] on the reward's device: of equal shapes as one batch, others as a list."""
    chosen = [media[row] for row in rows]
    if len({one.shape for one in chosen}) == 1:
        return torch.stack(chosen).to(reward.device).float().div_(255)
    return [one.to(reward.device).float().div_(255) for one in chosen]
