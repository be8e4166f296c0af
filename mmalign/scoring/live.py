"""Score a method's new samples: a weighted sum of rewards, with or without a gradient, each image scored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.cost import Cost
from mmalign.core.errors import UserError
from mmalign.losses.advantages import novelty, win_rates
from mmalign.scoring.choice import WeightedReward, weighted_total

REMEMBERED = 65_536
"""Scores kept in memory; the oldest are dropped first."""


@dataclass
class Scores:
    """Scores of a batch: the weighted sum that is learned from, and each reward's own, all float32 `[B]`."""

    total: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]]
    novelty: Float[Tensor, " batch"] | None = None
    """How much each image differs from the others of its group, where that was asked for."""


class LiveRewards:
    """The rewards of a run. Images without a gradient are looked up by their content before a reward is called.

    Not so for a reward whose score depends on the rest of the batch, which is called with all of it.
    """

    def __init__(self, rewards: Sequence[WeightedReward], cost: Cost) -> None:
        """Keep the rewards; every image scored by one of them counts in `cost.reward_calls`."""
        self.rewards = list(rewards)
        self._cost = cost
        self._known: dict[str, dict[bytes, float]] = {entry.name: {} for entry in self.rewards}

    def __call__(self, images: Float[Tensor, "batch *media"], prompts: Sequence[str]) -> Scores:
        """Score images or videos in [0, 1] against their prompts; the sum carries a gradient if the images do.

        Raises:
            UserError: a reward gave something that is not a finite number.
        """
        differentiable = images.requires_grad and torch.is_grad_enabled()
        parts = {}
        for entry in self.rewards:
            score = self._call(entry, images, prompts) if differentiable else self._look_up(entry, images, prompts)
            parts[entry.name] = _finite(entry, score, prompts)
        return Scores(weighted_total(parts, self.rewards), {name: score.detach() for name, score in parts.items()})

    def win_rates(
        self, images: Float[Tensor, "batch *media"], prompts: Sequence[str], size: int, tie_margin: float
    ) -> Scores:
        """Compare images in [0, 1] with the others of their group, each `size` in a row of one prompt.

        The sum is that of win rates, in [0, 1]. A reward whose class says `compares_pairs = True` is asked about each
        pair of a group, and its part is the win rate; the scores of the others are compared, and are the parts.

        Raises:
            UserError: a score is not a finite number. A comparison may be NaN, which is a tie.
        """
        total, parts = torch.zeros(len(images), device=images.device), {}
        for entry in self.rewards:
            if getattr(entry.reward, "compares_pairs", False):
                margins = self._judge(entry, images, prompts, size)
            else:
                parts[entry.name] = _finite(entry, self._look_up(entry, images, prompts), prompts)
                score = parts[entry.name].reshape(-1, size) * (1 if entry.reward.higher_is_better else -1)
                margins = score.unsqueeze(2) - score.unsqueeze(1)
            rates = win_rates(margins, tie_margin=tie_margin).flatten()
            parts.setdefault(entry.name, rates)
            total = total + entry.weight * rates
        return Scores(total, parts)

    def novelty(self, name: str, images: Float[Tensor, "batch 3 height width"], size: int) -> Float[Tensor, " batch"]:
        """Return the novelty of images in [0, 1] among their group, each `size` in a row, by a reward's embeddings."""
        entry = next(entry for entry in self.rewards if entry.name == name)
        return novelty(entry.reward.embeddings(images).unflatten(0, (-1, size))).flatten()

    def _judge(self, entry: WeightedReward, images: Tensor, prompts: Sequence[str], size: int) -> Tensor:
        first, second = torch.triu_indices(size, size, offset=1)
        margins = images.new_zeros(len(images) // size, size, size, dtype=torch.float32)
        for group, start in enumerate(range(0, len(images), size)):
            self._cost.add(reward_calls=len(first))
            asked = [prompts[start]] * len(first) if "prompts" in entry.reward.needs else None
            found = entry.reward.pairwise(images[start + first], images[start + second], prompts=asked)
            margins[group, first, second], margins[group, second, first] = found, -found
        return margins

    def _call(self, entry: WeightedReward, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self._cost.add(reward_calls=len(images))
        score: Tensor = entry.reward(images, prompts=list(prompts) if "prompts" in entry.reward.needs else None)
        return score

    def _look_up(self, entry: WeightedReward, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not entry.reward.batch_invariant:
            return self._call(entry, images, prompts)
        known = self._known[entry.name]
        keys = [_content_key(image, prompt) for image, prompt in zip(images.cpu(), prompts, strict=True)]
        new = list({key: row for row, key in enumerate(keys) if key not in known}.values())
        if new:
            scores = self._call(entry, images[new], [prompts[row] for row in new])
            known |= dict(zip((keys[row] for row in new), scores.tolist(), strict=True))
        found = images.new_tensor([known[key] for key in keys], dtype=torch.float32)
        for key in list(known)[: max(len(known) - REMEMBERED, 0)]:
            del known[key]
        return found


def _finite(entry: WeightedReward, score: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the scores, all of which must be numbers."""
    if not bool(score.detach().isfinite().all()):
        row = int((~score.detach().isfinite()).nonzero()[0])
        raise UserError(
            f"reward '{entry.name}' gave {float(score[row].detach())} for an image of {prompts[row]!r}; "
            "nothing can be learned from that: leave out this reward or this prompt"
        )
    return score


def _content_key(image: Tensor, prompt: str) -> bytes:
    digest = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16)
    digest.update(prompt.encode())
    return digest.digest()
