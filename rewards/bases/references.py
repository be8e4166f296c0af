"""Rewards that compare an image with reference images by the cosine of their embeddings (CLIP-I, DINO-I, ...)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.backbones.load import check_mode
from rewards.base import Reward
from rewards.bases.two_tower import unit
from rewards.media import read_media


class ReferenceReward(Reward):
    """Mean cosine between an image and each of its references; subclasses implement `encode_media`.

    The mean of cosines is the inner product with the mean of the references' unit vectors: one vector for each sample,
    computed before the micro-batches. References that samples share as one and the same tensor are embedded once.
    """

    needs = frozenset({"references"})
    differentiable = True
    range = (-1.0, 1.0)

    def __init__(self, *, preprocessing: str = "differentiable", **options: Any) -> None:
        """preprocessing: "differentiable" or "reference", as in `rewards.backbones.preprocess`."""
        super().__init__(**options)
        self.preprocessing = check_mode(preprocessing)

    @abstractmethod
    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed images in [0, 1]; the norm of the embedding does not matter."""

    def prepare_references(self, references: list[Tensor]) -> list[Tensor]:
        """Turn each set of references into the mean of its unit embeddings `[D]`."""
        return mean_embeddings(references, self.encode_media, self.batch_size, self.device)

    def score(
        self,
        media: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Return the mean cosine of each image with its own references."""
        assert references is not None, "declared in needs, and so checked before"
        return (unit(self.encode_media(media)) * torch.stack(list(references))).sum(-1)


def mean_embeddings(
    references: Sequence[Tensor],
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Return for each set of images `[R, 3, H, W]` the mean of their unit embeddings `[D]`.

    A tensor that stands for several sets is embedded once; images of one size go through `encode` together.
    """
    distinct = list({id(images): images for images in references}.values())
    rows = [image for images in distinct for image in images]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for positions, images in read_media(rows, "image", "references"):
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size].to(device)
            embedded = unit(encode(chunk.to(torch.promote_types(chunk.dtype, torch.float32))))
            for position, row in zip(positions[start : start + batch_size], embedded, strict=True):
                found[position] = row
    sets = torch.stack(found).split([len(images) for images in distinct])
    means = {id(images): embedded.mean(0) for images, embedded in zip(distinct, sets, strict=True)}
    return [means[id(images)] for images in references]
