"""Rewards on pairs of an image tower and a text tower, from any model library.

`load_encoder` loads a model of open_clip, or a CLIP, SigLIP or ALIGN of transformers.
`EncoderReward` adds preprocessing, a prefix and the truncation of prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.backbones.encoder import Encoder
from rewards.backbones.load import check_mode, load_encoder, load_preset
from rewards.backbones.truncation import Truncation
from rewards.bases.two_tower import TwoTowerReward

__all__ = ["Encoder", "EncoderReward", "check_mode", "load_encoder", "load_preset"]  # all that a preset needs


class EncoderReward(TwoTowerReward):
    """Cosine of an encoder's embeddings; a subclass calls `use` with its encoder and may override `compare`."""

    range = (-1.0, 1.0)
    prefix: str = ""

    def __init__(self, *, preprocessing: str = "differentiable", **options: Any) -> None:
        """preprocessing: "differentiable" or "reference", as in `rewards.backbones.preprocess`."""
        super().__init__(**options)
        self.preprocessing = check_mode(preprocessing)

    def use(self, encoder: Encoder) -> None:
        """Move an encoder to the reward's device and dtype."""
        # A convolutional image tower is a quarter faster on a CPU with channels last; other models are not affected.
        self.encoder = encoder.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        self.source = encoder.source
        self.truncation = Truncation(self.name, encoder.context)

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed images by the image tower."""
        return self.encoder.embed_media(media, self.preprocessing)

    def encode_prompts(self, prompts: list[str]) -> Float[Tensor, "batch features"]:
        """Embed prompts, prefix first, by the text tower; what exceeds its context is cut with a warning."""
        texts = [self.prefix + prompt for prompt in prompts]
        tokens, counts = self.encoder.tokenize(texts)
        self.truncation.note(texts, counts)
        return self.encoder.embed_tokens(tokens)

    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Return the cosine as the score."""
        return cosine

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut at the context length so far."""
        return self.truncation.count
