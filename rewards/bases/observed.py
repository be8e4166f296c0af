"""Rewards that analyse an image once, independent of the prompt, and then compare the result with each prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rewards.base import Reward
from rewards.media import Media, pil_images, read_media


class ObservedReward(Reward):
    """Compare observations of an image with a prompt; subclasses implement `observe` and `rate`."""

    needs = frozenset({"prompts"})

    @abstractmethod
    def observe(self, images: list[Image.Image]) -> Sequence[Any]:
        """Return one observation for each of the RGB images of one size."""

    @abstractmethod
    def rate(self, observed: Any, prompt: str) -> float:
        """Score one observation against one prompt."""

    def score(
        self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
    ) -> Float[Tensor, " batch"]:
        """Observe and rate."""
        seen = self.observe(pil_images(media))
        return media.new_tensor([self.rate(one, prompt) for one, prompt in zip(seen, prompts or (), strict=True)])

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every image against every prompt: `[B, P]` float32; each image is observed once."""
        self._check_matrix(prompts)

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            return chunk.new_tensor([[self.rate(one, p) for p in prompts] for one in self.observe(pil_images(chunk))])

        return self._run(read_media(media, self.modality), row)

    def observations(self, media: Media) -> list[Any]:
        """Return the observation of each image."""
        found: dict[int, Any] = {}
        with torch.inference_mode():
            for positions, group in read_media(media, self.modality):
                for start in range(0, len(positions), self.batch_size):
                    stop = start + self.batch_size
                    seen = self.observe(pil_images(group[start:stop]))
                    found.update(zip(positions[start:stop], seen, strict=True))
        return [found[position] for position in range(len(found))]
