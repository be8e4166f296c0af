"""Rewards whose model reads a medium and a prompt together (ImageReward, VQAScore, HPSv3, ...), unlike two towers.

The part that depends only on the medium is still computed once for any number of prompts: a subclass encodes media,
and then compares each encoded medium with one prompt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import Reward
from rewards.errors import RewardError
from rewards.media import Media, read_media


class CrossEncoderReward(Reward):
    """Compare media with prompts in one model; subclasses implement `encode_media` and `compare`."""

    needs = frozenset({"prompts"})

    @abstractmethod
    def encode_media(self, media: Float[Tensor, " batch *shape"]) -> Any:
        """Compute the part that depends only on the media, given in [0, 1]."""

    @abstractmethod
    def compare(self, encoded: Any, prompts: list[str]) -> Float[Tensor, " batch"]:
        """Score the B media behind `encoded` against B prompts."""

    def score(
        self,
        media: Float[Tensor, " batch *shape"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare the i-th medium with the i-th prompt."""
        assert prompts is not None, "declared in needs, and so checked before"
        return self.compare(self.encode_media(media), list(prompts))

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every medium against every prompt: `[B, P]` float32, each medium encoded once."""
        self._check_matrix(prompts)

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            encoded = self.encode_media(chunk)
            return torch.stack([self.compare(encoded, [prompt] * len(chunk)) for prompt in prompts], dim=1)

        return self._run(read_media(media, self.modality), row)


def refuse_tokens(name: str, prompts: Sequence[str], tokens: Iterable[str]) -> None:
    """Raise `RewardError` for a prompt that contains a special token, which would change the model's input."""
    for token in tokens:
        for prompt in prompts:
            if token in prompt:
                raise RewardError(f"{name}: prompt {prompt[:60]!r} contains the special token {token!r}; remove it")
