"""PickScore v1: a CLIP ViT-H/14 fine-tuned on the choices of users of a text-to-image service.

Source: Kirstain et al. 2023, "Pick-a-Pic" (arXiv:2305.01569), section 4:

    s(x, y) = exp(t) cos(E_text(x), E_image(y)),    P(y_1 over y_2 | x) = softmax over the images of s

with t the `logit_scale` of the checkpoint (exp(t) about 100, by which scores lie about 17 to 24). Others report other
scales under the same name: `scale=1` is the bare cosine, and Flow-GRPO divides by 26.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from rewards.backbones.hf_encoder import load_hf_encoder
from rewards.backbones.preprocess import Preprocess
from rewards.backbones.weights import Weights
from rewards.bases.encoder import EncoderReward
from rewards.media import Media

PUBLISHED = Weights("yuvalkirstain/PickScore_v1", "model.safetensors")
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(EncoderReward):
    """Human preference among images of one prompt, by PickScore v1; about 17 to 24.

    weights: a directory in transformers' layout or a hub id, by default `yuvalkirstain/PickScore_v1`. tokenizer:
    directory or hub id; by default the directory of the weights where that has one, else that of the CLIP it was
    tuned from. scale: factor of the cosine, by default the checkpoint's own; it stands in `version`. Prompts have no
    template and are cut at 77 tokens, with one warning. preprocessing: as in `rewards.backbones.preprocess`. Raises
    `RewardError` for weights that cannot be had or are another model's.
    """

    name: ClassVar[str] = "pickscore"
    version = "v1"
    range = (-100.0, 100.0)
    licence = "MIT"
    source = f"{PUBLISHED.repo}; tokenizer of {PROCESSOR}"
    citation = "Kirstain et al. 2023, arXiv:2305.01569"
    files = (PUBLISHED,)

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        tokenizer: str | PathLike[str] | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> None:
        """Load CLIP and tokenizer."""
        super().__init__(**options)
        path = Path(weights or PUBLISHED.repo).expanduser()
        source = path if path.is_dir() else str(weights or PUBLISHED.repo)
        own = any((path / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        encoder = load_hf_encoder(source, tokenizer=tokenizer or (path if own else PROCESSOR))
        encoder.preprocess = Preprocess(encoder.model.config.vision_config.image_size)
        # read before the weights are rounded to half precision
        trained = encoder.model.logit_scale.exp().item()
        self.scale = trained if scale is None else float(scale)
        self.range = (-abs(self.scale), abs(self.scale))
        self.version = "v1" if scale is None else f"v1, scale {self.scale:g}"
        self.use(encoder)

    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Apply the temperature."""
        return self.scale * cosine

    def preferences(self, media: Media, prompt: str) -> Float[Tensor, " batch"]:
        """Return the probability that each of several images for one prompt is chosen: `[B]`, adding up to 1."""
        return self.matrix(media, [prompt])[:, 0].softmax(0)
