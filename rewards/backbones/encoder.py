"""Pairs of an image tower and a text tower with one interface for all model libraries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.preprocess import Preprocess


class Encoder(nn.Module, ABC):
    """Embed pixels and texts in one space; the norms of the embeddings do not matter.

    `preprocess`: how media become pixels; `context`: how many tokens a text may have, start and end included;
    `source`: where the weights came from.
    """

    preprocess: Preprocess
    context: int
    source: str

    # Modules and parameters of `model` that only texts need, by the names that the libraries give them.
    text_parts: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module) -> None:
        """Hold a model of the library."""
        super().__init__()
        self.model: Any = model

    @abstractmethod
    def embed_pixels(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed preprocessed images."""

    @abstractmethod
    def tokenize(self, texts: list[str]) -> tuple[dict[str, Tensor], list[int]]:
        """Return the tokens of texts, cut at the context, and the uncut token counts, start and end included."""

    @abstractmethod
    def embed_tokens(self, tokens: dict[str, Tensor]) -> Float[Tensor, "batch features"]:
        """Embed the result of `tokenize`."""

    def embed_texts(self, texts: list[str]) -> Float[Tensor, "batch features"]:
        """Embed texts, cut at the context, the end token kept."""
        return self.embed_tokens(self.tokenize(texts)[0])

    def embed_media(
        self, media: Float[Tensor, "batch 3 height width"], mode: str = "differentiable"
    ) -> Float[Tensor, "batch features"]:
        """Preprocess and embed images in [0, 1]."""
        return self.embed_pixels(self.preprocess(media, mode).to(next(self.parameters()).dtype))

    def without_texts(self) -> Encoder:
        """Drop the text tower, for a reward that embeds only images."""
        for part in self.text_parts:
            if hasattr(self.model, part):
                delattr(self.model, part)
        return self
