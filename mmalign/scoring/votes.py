"""Score the samples of a prompt by comparing them with each other: the share of the votes that each gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.io.items import Item
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.engine import Scored, decode_ahead


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
    another one the higher score wins. A group with an item that cannot be read is not compared: its shares are 1/2.
    For a reward of which less is better the share is negative, so that the signed sum counts votes.
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
    reward, size = entry.reward, len(media)
    levels = [one.to(reward.device).float().div(255) for one in media]
    if getattr(reward, "compares_pairs", False):
        first, second = torch.triu_indices(size, size, offset=1).tolist()
        asked = [prompt or ""] * len(first) if "prompts" in reward.needs else None
        found = (
            reward.pairwise(_batch(levels, first), _batch(levels, second), prompts=asked).float().cpu().clamp(-1, 1)
        )
        votes = torch.zeros(size, size)
        votes[first, second], votes[second, first] = found, -found
        shares = vote_shares(votes)
    else:
        scores = reward(levels, prompts=[prompt or ""] * size if "prompts" in reward.needs else None).cpu()
        shares = vote_shares(
            (scores.unsqueeze(1) - scores.unsqueeze(0)).sign() * (1 if reward.higher_is_better else -1)
        )
    return shares if reward.higher_is_better else -shares


def _batch(media: Sequence[Tensor], rows: Sequence[int]) -> Tensor | list[Tensor]:
    """Return media of equal shapes as one batch, others as a list."""
    chosen = [media[row] for row in rows]
    return torch.stack(chosen) if len({one.shape for one in chosen}) == 1 else chosen
