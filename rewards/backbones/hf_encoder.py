"""Models of transformers as encoders: CLIP, SigLIP, ALIGN, each tokenized as it was trained.

CLIP pools at the end token; with `eos_token_id` 2 in its configuration, as in the older checkpoints (PickScore, MPS),
transformers takes the highest token id instead, which is the same place. That configuration must not be "corrected".
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.encoder import Encoder
from rewards.backbones.hf import features, image_preprocessing, load_pretrained
from rewards.backbones.preprocess import Preprocess
from rewards.errors import RewardError, choices


class Family(NamedTuple):
    """A kind of model: its class in transformers, and how its texts were tokenized in training.

    `mask`: whether padding is masked; `context`: tokens of a text where the text tower itself would take more.
    """

    cls: str
    padding: bool | str
    mask: bool
    context: int | None = None


FAMILIES = {
    "clip": Family("CLIPModel", padding=True, mask=True),
    "siglip": Family("SiglipModel", padding="max_length", mask=False),
    "align": Family("AlignModel", padding="max_length", mask=True, context=64),
}


class HfEncoder(Encoder):
    """A two-tower model of transformers with its tokenizer."""

    text_parts = ("text_model", "text_projection")

    def __init__(self, model: nn.Module, tokenizer: Any, family: Family, preprocess: Preprocess, source: str) -> None:
        """Combine the parts that `load_hf_encoder` has loaded."""
        super().__init__(model)
        self.tokenizer, self.family, self.preprocess, self.source = tokenizer, family, preprocess, source
        limit = family.context or self.model.config.text_config.max_position_embeddings
        self.context = min(limit, tokenizer.model_max_length)

    def embed_pixels(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed preprocessed images."""
        return features(self.model.get_image_features(pixel_values=pixels))

    def tokenize(self, texts: list[str]) -> tuple[dict[str, Tensor], list[int]]:
        """Return the tokens of texts, cut at the context with the end token kept, and the uncut token counts."""
        tokens = self.tokenizer(
            texts, padding=self.family.padding, truncation=True, max_length=self.context, return_tensors="pt"
        )
        given = {"input_ids": tokens["input_ids"]}
        if self.family.mask:
            given["attention_mask"] = tokens["attention_mask"]
        return given, [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def embed_tokens(self, tokens: dict[str, Tensor]) -> Float[Tensor, "batch features"]:
        """Embed the result of `tokenize`."""
        device = next(self.parameters()).device
        return features(self.model.get_text_features(**{name: ids.to(device) for name, ids in tokens.items()}))


def load_hf_encoder(
    source: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    preprocess: Preprocess | None = None,
) -> HfEncoder:
    """Load a directory in transformers' layout or a model of the hub.

    tokenizer: where that lies, if not beside the weights; preprocess: by default what the image processor's
    configuration beside the weights says. Raises `RewardError` for another kind of model, or an incomplete one.
    """
    import torch

    config = load_pretrained("AutoConfig", source)
    if config.model_type not in FAMILIES:
        raise RewardError(
            f"{source}: the model type {config.model_type!r} is not supported; {choices(config.model_type, FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    model = load_pretrained(family.cls, source, dtype=torch.float32)
    words = load_pretrained("AutoTokenizer", source if tokenizer is None else tokenizer)
    return HfEncoder(model, words, family, preprocess or image_preprocessing(source), str(source))
