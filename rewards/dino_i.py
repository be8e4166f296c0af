"""DINO-I: similarity of an image to reference images of a subject, by a self-supervised vision transformer.

Source: Ruiz et al. 2023, "DreamBooth" (arXiv:2208.12242), section 4.2, there called DINO: the mean over all pairs of a
generated and a reference image of the cosine of ViT-S/16 DINO embeddings (Caron et al. 2021, arXiv:2104.14294), which
unlike CLIP's tell one subject of a class from another. The embedding is the last hidden state at [CLS], after the last
layer norm. Images are prepared as the image processor's configuration beside the weights says; that of
facebook/dino-vits16 is taken to squash to 224 x 224, bilinear, with ImageNet's statistics, but was not available for a
check.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.backbones.hf import image_preprocessing, load_pretrained
from rewards.bases.references import ReferenceReward
from rewards.errors import RewardError, choices

DEFAULT = "facebook/dino-vits16"

# Kinds of model to classes of transformers and their options: the pooler is not DINO's and not in its checkpoints.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", {"add_pooling_layer": False}),
    "dinov2": ("Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
}


class DinoI(ReferenceReward):
    """Similarity of an image to reference images of a subject: mean cosine of DINO embeddings.

    weights: a directory in transformers' layout or a hub id of a ViT (DINO) or a DINOv2, by default DINO ViT-S/16.
    Needs `references`: for each sample a tensor `[R, 3, H, W]`. preprocessing: as in `rewards.backbones.preprocess`.
    Raises `RewardError` for another kind of model, or an incomplete one.
    """

    name: ClassVar[str] = "dino-i"
    licence = "Apache-2.0; other weights: see their card"
    source = DEFAULT
    citation = "Ruiz et al. 2023, arXiv:2208.12242; Caron et al. 2021, arXiv:2104.14294"
    version = "ViT-S/16"

    def __init__(self, *, weights: str | PathLike[str] | None = None, **options: Any) -> None:
        """Load the transformer."""
        super().__init__(**options)
        path = Path(weights or DEFAULT).expanduser()
        self.source = str(path if path.is_dir() else weights or DEFAULT)
        kind = load_pretrained("AutoConfig", self.source).model_type
        if kind not in FAMILIES:
            raise RewardError(f"dino-i: {self.source} is a model of type {kind!r}; {choices(kind, FAMILIES)}")
        cls, own = FAMILIES[kind]
        self.preprocess = image_preprocessing(self.source)
        model = load_pretrained(cls, self.source, dtype=torch.float32, **own)
        self.model = model.to(self.device, self.dtype)
        self.version = self.version if weights is None else self.source

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed images by the last hidden state at [CLS]."""
        pixels = self.preprocess(media, self.preprocessing).to(self.dtype)
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]
