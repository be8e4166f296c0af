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
from mmalign.scoring.choice import WeightedReward, weighted_total

REMEMBERED = 65_536
"""Scores kept in memory; the oldest are dropped first."""


@dataclass
class Scores:
    """Scores of a batch: the weighted sum that is learned from, and each reward's own, all float32 `[B]`."""

    total: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]]


class LiveRewards:
    """The rewards of a run. Images without a gradient are looked up by their content before a reward is called."""

    def __init__(self, rewards: Sequence[WeightedReward], cost: Cost) -> None:
        """Keep the rewards; every image scored by one of them counts in `cost.reward_calls`."""
        self.rewards = list(rewards)
        self._cost = cost
        self._known: dict[str, dict[bytes, float]] = {entry.name: {} for entry in self.rewards}

    def __call__(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Scores:
        """Score images in [0, 1] against their prompts; the sum carries a gradient if the images do.

        Raises:
            UserError: a reward gave something that is not a finite number.
        """
        differentiable = images.requires_grad and torch.is_grad_enabled()
        parts = {}
        for entry in self.rewards:
            score = self._call(entry, images, prompts) if differentiable else self._look_up(entry, images, prompts)
            if not bool(score.detach().isfinite().all()):
                row = int((~score.detach().isfinite()).nonzero()[0])
                raise UserError(
                    f"reward '{entry.name}' gave {float(score[row].detach())} for an image of {prompts[row]!r}; "
                    "nothing can be learned from that: leave out this reward or this prompt"
                )
            parts[entry.name] = score
        return Scores(weighted_total(parts, self.rewards), {name: score.detach() for name, score in parts.items()})

    def _call(self, entry: WeightedReward, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self._cost.add(reward_calls=len(images))
        score: Tensor = entry.reward(images, prompts=list(prompts) if "prompts" in entry.reward.needs else None)
        return score

    def _look_up(self, entry: WeightedReward, images: Tensor, prompts: Sequence[str]) -> Tensor:
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


def _content_key(image: Tensor, prompt: str) -> bytes:
    digest = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16)
    digest.update(prompt.encode())
    return digest.digest()
