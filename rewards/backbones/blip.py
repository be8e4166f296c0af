"""BLIP's image-grounded text encoder in plain torch: a ViT, and a BERT whose layers also attend to the image.

Source: Li et al. 2022, "BLIP" (arXiv:2201.12086), figure 2: the text encoder that matches image and text. Layer by
layer: self-attention over the text, cross-attention from the text to the image, feed-forward, each followed by a
LayerNorm over the sum with its input. The text sees itself in both directions. There are no token-type embeddings.

Names of modules are those of the published checkpoints (`visual_encoder.*` as in timm, `text_encoder.*` as in BERT),
and every size is read from the checkpoint; the width of an attention head is 64 in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rewards.errors import RewardError

HEAD_WIDTH = 64

ImageContext = list[tuple[Tensor, Tensor]]
"""What the text attends to: for each layer the keys and values `[B, heads, patches, 64]` of the image."""


class Blip(nn.Module):
    """Image and text together -> the text's hidden states. Sizes come from the names and shapes of `state`."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Build the modules for which `state` has weights; no weights are copied."""
        super().__init__()
        try:
            self.visual_encoder = VisionTransformer(state, f"{prefix}visual_encoder.")
            self.text_encoder = TextEncoder(state, f"{prefix}text_encoder.")
        except KeyError as error:
            raise RewardError(f"not the weights of a BLIP: {error.args[0]} is missing") from None

    def image_context(self, pixels: Float[Tensor, "batch 3 height width"]) -> ImageContext:
        """Encode normalised images into keys and values for the text, once for any number of prompts."""
        return self.text_encoder.image_context(self.visual_encoder(pixels))

    def forward(
        self, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"], image: ImageContext
    ) -> Float[Tensor, "batch length features"]:
        """Return the last hidden states of texts that attend to images; `mask` is true at real tokens."""
        return self.text_encoder(ids, mask, image)


class VisionTransformer(nn.Module):
    """A pre-norm ViT with a class token and learnt positions: `[B, 3, H, W]` -> `[B, 1 + patches, width]`."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Build as many blocks as the weights have."""
        super().__init__()
        width, channels, *_, patch = state[f"{prefix}patch_embed.proj.weight"].shape
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = state[f"{prefix}pos_embed"].shape[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.image_size = patch * round((positions - 1) ** 0.5)
        hidden = len(state[f"{prefix}blocks.0.mlp.fc1.weight"])
        self.blocks = nn.ModuleList([VisionBlock(width, hidden) for _ in range(_count(state, f"{prefix}blocks."))])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches features"]:
        """Encode normalised images of the size of the position embeddings."""
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class VisionBlock(nn.Module):
    """One layer of the ViT."""

    def __init__(self, width: int, hidden: int) -> None:
        """`hidden` is the width inside the feed-forward part."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, N, width]` -> the same shape."""
        query, key, value = (_heads(part) for part in self.attn["qkv"](self.norm1(hidden)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden))))


class TextEncoder(nn.Module):
    """A BERT with cross-attention to the image in every layer."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Build as many layers as the weights have."""
        super().__init__()
        vocabulary, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
        positions = len(state[f"{prefix}embeddings.position_embeddings.weight"])
        image_width = state[f"{prefix}encoder.layer.0.crossattention.self.key.weight"].shape[1]
        hidden = len(state[f"{prefix}encoder.layer.0.intermediate.dense.weight"])
        self.words = vocabulary
        self.width = width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        layers = [TextLayer(width, image_width, hidden) for _ in range(_count(state, f"{prefix}encoder.layer."))]
        # A ModuleDict for its name in the checkpoints: encoder.layer.0, encoder.layer.1, ...
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def image_context(self, image: Float[Tensor, "batch patches features"]) -> ImageContext:
        """Project the image to every layer's keys and values."""
        return [layer.crossattention.keys_and_values(image) for layer in self._layers]

    @property
    def _layers(self) -> list[Any]:
        return list(self.encoder["layer"].children())

    def forward(self, ids: Tensor, mask: Tensor, image: ImageContext) -> Tensor:
        """`[B, L]` token ids -> `[B, L, width]`."""
        embeddings = self.embeddings
        positions = torch.arange(ids.shape[1], device=ids.device)
        hidden = embeddings["word_embeddings"](ids) + embeddings["position_embeddings"](positions)
        hidden = embeddings["LayerNorm"](hidden)
        for layer, context in zip(self._layers, image, strict=True):
            hidden = layer(hidden, mask[:, None, None, :], context)
        return hidden


class TextLayer(nn.Module):
    """One layer of the text encoder."""

    def __init__(self, width: int, image_width: int, hidden: int) -> None:
        """`hidden` is the width inside the feed-forward part."""
        super().__init__()
        self.attention = Attention(width, width)
        self.crossattention = Attention(width, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = Residual(hidden, width)

    def forward(self, hidden: Tensor, mask: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, L, width]` -> the same shape."""
        hidden = self.attention(hidden, self.attention.keys_and_values(hidden), mask)
        hidden = self.crossattention(hidden, context, None)
        return self.output(F.gelu(self.intermediate["dense"](hidden)), hidden)


class Attention(nn.Module):
    """Attention from the text to a context, with BERT's residual and LayerNorm after it."""

    def __init__(self, width: int, context_width: int) -> None:
        """`context_width` is the width of the context."""
        super().__init__()
        # BERT's own name; an attribute `self` is unusual but legal.
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = Residual(width, width)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, N, context_width]` -> two times `[B, heads, N, 64]`."""
        return _heads(self.self["key"](context)), _heads(self.self["value"](context))

    def forward(self, hidden: Tensor, context: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """`[B, L, width]` -> the same shape."""
        attended = F.scaled_dot_product_attention(_heads(self.self["query"](hidden)), *context, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2), hidden)


class Residual(nn.Module):
    """LayerNorm(linear(x) + residual)."""

    def __init__(self, inner: int, width: int) -> None:
        """Map `inner` features to `width`."""
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """`[B, L, inner]` and `[B, L, width]` -> `[B, L, width]`."""
        return self.LayerNorm(self.dense(hidden) + residual)


def _heads(hidden: Tensor) -> Tensor:
    """`[B, N, width]` -> `[B, heads, N, 64]`."""
    return hidden.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
