"""CLIP-I: similarity of an image to reference images of a subject, by a CLIP image tower.

Source: Ruiz et al. 2023, "DreamBooth" (arXiv:2208.12242), section 4.2: the mean over all pairs of a generated and a
reference image of the cosine of their CLIP embeddings. The model is OpenAI's ViT-B/16, as in the code of RPO (Miao
et al. 2024) and most reports on DreamBench; the CLIP-T of the same reports is the reward `clip` with those weights.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from rewards.backbones.load import load_encoder
from rewards.bases.references import ReferenceReward

DEFAULT = "openai/clip-vit-base-patch16"


class ClipI(ReferenceReward):
    """Similarity of an image to reference images: mean cosine of CLIP embeddings.

    weights: as of the reward `clip` (a directory, a hub id, any CLIP, SigLIP or ALIGN), by default OpenAI's ViT-B/16.
    Needs `references`: for each sample a tensor `[R, 3, H, W]`. preprocessing: as in `rewards.backbones.preprocess`.
    """

    name: ClassVar[str] = "clip-i"
    licence = "MIT (OpenAI's code and weights); other weights: see their card"
    source = DEFAULT
    citation = "Ruiz et al. 2023, arXiv:2208.12242; Radford et al. 2021, arXiv:2103.00020"
    version = "ViT-B/16"

    def __init__(self, *, weights: str | PathLike[str] | None = None, **options: Any) -> None:
        """Load the image tower."""
        super().__init__(**options)
        self.encoder = load_encoder(weights or DEFAULT).without_texts().to(self.device, self.dtype)
        self.source = self.encoder.source
        self.version = self.version if weights is None else self.source

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed images by the image tower."""
        return self.encoder.embed_media(media, self.preprocessing)
