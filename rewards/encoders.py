"""Pairs of an image tower and a text tower behind one interface, whichever library they come from.

`load_encoder` finds out what it is given: a model of open_clip, or a CLIP, SigLIP or ALIGN of transformers.
`EncoderReward` is the reward on top of one: preprocessing, prefix, truncated prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.errors import RewardError, choices
from rewards.preprocess import MODES, Preprocess
from rewards.truncation import Truncation
from rewards.two_tower import TwoTowerReward


class Encoder(nn.Module, ABC):
    """Embed pixels and texts in one space; the lengths of the embeddings do not matter.

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
        """Return the tokens of texts, cut at the context, and how many each whole text has, start and end included."""

    @abstractmethod
    def embed_tokens(self, tokens: dict[str, Tensor]) -> Float[Tensor, "batch features"]:
        """Embed what `tokenize` returned."""

    def embed_texts(self, texts: list[str]) -> Float[Tensor, "batch features"]:
        """Embed texts, cut at the context, the end token kept."""
        return self.embed_tokens(self.tokenize(texts)[0])

    def embed_media(
        self, media: Float[Tensor, "batch 3 height width"], mode: str = "differentiable"
    ) -> Float[Tensor, "batch features"]:
        """Preprocess and embed images in [0, 1]."""
        return self.embed_pixels(self.preprocess(media, mode).to(next(self.parameters()).dtype))

    def without_texts(self) -> Encoder:
        """Drop the text tower, for a reward that embeds images alone."""
        for part in self.text_parts:
            if hasattr(self.model, part):
                delattr(self.model, part)
        return self


class EncoderReward(TwoTowerReward):
    """Cosine of an encoder's embeddings; a subclass calls `use` with its encoder and may override `compare`."""

    range = (-1.0, 1.0)
    prefix: str = ""

    def __init__(self, *, preprocessing: str = "differentiable", **options: Any) -> None:
        """preprocessing: "differentiable" or "reference", as in `rewards.preprocess`."""
        super().__init__(**options)
        self.preprocessing = check_mode(preprocessing)

    def use(self, encoder: Encoder) -> None:
        """Take an encoder to the reward's device and dtype."""
        # A convolutional image tower is a quarter faster on a CPU when its channels come last; others do not care.
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
        """The cosine is the score."""
        return cosine

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut at the context length so far."""
        return self.truncation.count


def check_mode(preprocessing: str) -> str:
    """Return the name of a preprocessing mode, or raise `RewardError` with the allowed ones."""
    if preprocessing not in MODES:
        raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
    return preprocessing


def load_encoder(
    weights: str | PathLike[str] | None, *, model: str | None = None, pretrained: str | None = None
) -> Encoder:
    """Load the encoder that `weights` names, or else open_clip's `model` with its tag `pretrained`.

    weights: a directory in open_clip's or transformers' layout; a weights file for open_clip's `model`;
    `hf-hub:org/name` for open_clip, `org/name` for transformers. Raises `RewardError` for anything else.
    """
    from rewards.hf_encoder import load_hf_encoder
    from rewards.open_clip_encoder import HUB, load_open_clip

    path = None if weights is None else Path(weights).expanduser()
    given = str(weights)
    if path is None or path.is_file() or given.startswith(HUB) or (path / "open_clip_config.json").is_file():
        return load_open_clip(weights, model=model, pretrained=pretrained)
    if model is not None or pretrained is not None:
        raise RewardError(f"weights {given!r} name a whole model; leave out model= and pretrained=")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RewardError(f"{path} is no model: it lacks open_clip_config.json, or transformers' config.json")
        return load_hf_encoder(path)
    if given.count("/") != 1 or path.is_absolute():
        raise RewardError(
            f"weights {given!r}: no such directory or file; allowed: a directory of open_clip or transformers, a "
            f"weights file (with model=), or a model of the hub, 'hf-hub:org/name' for open_clip, 'org/name' for "
            "transformers"
        )
    try:
        return load_hf_encoder(given)
    except RewardError as error:
        raise RewardError(
            f"weights {given!r}: no such directory or file here; as a model of the hub: {error}"
        ) from error


def load_preset(weights: str | PathLike[str] | None, *, model: str, pretrained: str | None) -> Encoder:
    """Load what `weights` names, where a file is of open_clip's `model`, or else that model with its tag.

    Raises `RewardError` as `load_encoder`.
    """
    if weights is None:
        return load_encoder(None, model=model, pretrained=pretrained)
    return load_encoder(weights, model=model if Path(weights).expanduser().is_file() else None)
