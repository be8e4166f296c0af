"""CLIPScore: how well a caption describes an image, by the cosine of CLIP embeddings.

Sources: Radford et al. 2021 (arXiv:2103.00020); Hessel et al. 2021, "CLIPScore" (arXiv:2104.08718), section 3. Papers
report three scales under one name, so the kind is an option and stands in `version`:

* `cosine`     cos(image, text), in [-1, 1]; the default; the CLIP-T of DreamBench with `weights` of ViT-B/16;
* `clipscore`  100 * max(cos, 0), as torchmetrics and most alignment papers;
* `hessel`     2.5 * max(cos, 0) with "A photo depicts " before the caption, as the CLIPScore paper.

`scale=` and `prefix=` override the kind's own. With `captions=`, the reference captions of each prompt, the score is
RefCLIPScore (section 3 there): the harmonic mean of the CLIPScore and max(0, the greatest cosine between the prompt
and its references), all with the prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import check_strings
from rewards.encoders import EncoderReward, load_encoder
from rewards.errors import RewardError, choices
from rewards.media import Media


class Kind(NamedTuple):
    """How a cosine becomes a score: `scale * max(cos, 0)`, or without the maximum where `clamp` is false."""

    scale: float
    prefix: str
    clamp: bool


KINDS = {
    "cosine": Kind(1.0, "", clamp=False),
    "clipscore": Kind(100.0, "", clamp=True),
    "hessel": Kind(2.5, "A photo depicts ", clamp=True),
}


class ClipReward(EncoderReward):
    """Agreement of image and prompt: cosine of the embeddings of any CLIP, SigLIP or ALIGN.

    The model is named by `weights` (a directory in open_clip's or transformers' layout, `hf-hub:org/name` for
    open_clip, `org/name` for transformers), or else by open_clip's own `model` and `pretrained` tag; `weights` may
    also be a weights file for that `model`. `preprocessing="reference"` resizes through PIL, without gradient.
    `captions`, for a kind that cuts at zero: prompts to their reference captions, a mapping or a JSON file with one.

    A subclass with another `name` is a preset: it may override `default_weights`, `default_kind`, `default_model`,
    `default_pretrained`, and the facts.
    """

    name: ClassVar[str] = "clip"
    licence = "code and OpenAI weights MIT; other weights: see their card"
    source = "open_clip ViT-B-32-quickgelu, tag openai"
    citation = "Hessel et al. 2021, arXiv:2104.08718; Radford et al. 2021, arXiv:2103.00020"
    version = "cosine"

    default_model: ClassVar[str] = "ViT-B-32-quickgelu"
    default_pretrained: ClassVar[str] = "openai"
    default_kind: ClassVar[str] = "cosine"

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        kind: str | None = None,
        scale: float | None = None,
        prefix: str | None = None,
        captions: Mapping[str, Sequence[str]] | str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Load the model; nothing given means the class's defaults."""
        super().__init__(**options)
        self.kind = _kind(kind or self.default_kind, scale, prefix)
        self.prefix = self.kind.prefix
        self.range = (0.0 if self.kind.clamp else -self.kind.scale, self.kind.scale)
        self.version = f"{kind or self.default_kind}, scale {self.kind.scale:g}, prefix {self.prefix!r}"
        self.captions = None if captions is None else _captions(captions)
        if self.captions is not None:
            if not self.kind.clamp:
                raise RewardError("captions= needs a kind that cuts at zero: kind='hessel' or kind='clipscore'")
            self.range = (0.0, 2 * self.kind.scale / (self.kind.scale + 1))
            self.version += ", with reference captions"
        if weights is None and model is None and pretrained is None:
            weights = self.default_weights()
        if weights is None:
            model, pretrained = model or self.default_model, pretrained or self.default_pretrained
        self.use(load_encoder(weights, model=model, pretrained=pretrained))

    @classmethod
    def default_weights(cls) -> str | None:
        """Where a preset has its weights; asked at load time, so that it may look for them."""
        return None

    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Apply the kind: scale, and cut at zero."""
        return self.kind.scale * (cosine.clamp(min=0) if self.kind.clamp else cosine)

    def score(
        self,
        media: Float[Tensor, " batch *shape"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare the i-th medium with the i-th prompt, and that with its reference captions where there are any."""
        scores = super().score(media, prompts, references)
        return self._with_captions(scores, prompts or ())

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every medium against every prompt: `[B, P]` float32, each medium and each prompt embedded once."""
        return self._with_captions(super().matrix(media, prompts), prompts)

    def _with_captions(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Make RefCLIPScores of CLIPScores `[..., P]`."""
        if self.captions is None:
            return scores
        lacking = [prompt for prompt in prompts if prompt not in self.captions]
        if lacking:
            raise RewardError(f"captions= has none for the prompt {lacking[0]!r}, nor for {len(lacking) - 1} others")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            pairs = zip(self.prompt_embeddings(prompts), prompts, strict=True)
            nearest = [(self.prompt_embeddings(self.captions[p]) @ embedding).max() for embedding, p in pairs]
        agreement = torch.stack(nearest).clamp(min=0).to(scores)
        return 2 * scores * agreement / (scores + agreement).clamp(min=1e-12)


def _captions(given: Mapping[str, Sequence[str]] | str | PathLike[str]) -> dict[str, list[str]]:
    try:
        read = given if isinstance(given, Mapping) else json.loads(Path(given).read_text(encoding="utf-8"))
        found = {prompt: [row] if isinstance(row, str) else list(row) for prompt, row in read.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RewardError(
            f"captions={str(given)[:60]!r}: no mapping of prompts to lists of captions: {error}"
        ) from error
    for prompt, row in found.items():
        if not row:
            raise RewardError(f"captions= has an empty list for the prompt {prompt!r}")
        check_strings(row)
    return found


def _kind(kind: str, scale: float | None, prefix: str | None) -> Kind:
    if kind not in KINDS:
        raise RewardError(f"kind {kind!r} is unknown; {choices(kind, KINDS)}")
    base = KINDS[kind]
    return Kind(base.scale if scale is None else scale, base.prefix if prefix is None else prefix, base.clamp)
