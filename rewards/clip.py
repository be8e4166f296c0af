"""CLIPScore: how well a caption describes an image, by the cosine of CLIP embeddings.

Sources: Radford et al. 2021 (arXiv:2103.00020); Hessel et al. 2021, "CLIPScore" (arXiv:2104.08718), section 3. Papers
report three scales under one name, so the kind is an option and stands in `version`:

* `cosine`     cos(image, text), in [-1, 1]; the default; the CLIP-T of DreamBench with `weights` of ViT-B/16;
* `clipscore`  100 * max(cos, 0), as torchmetrics and most alignment papers;
* `hessel`     2.5 * max(cos, 0) with "A photo depicts " before the caption, as the CLIPScore paper.

`scale=` and `prefix=` override the kind's own.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from rewards.backbones.load import load_encoder
from rewards.bases.encoder import EncoderReward
from rewards.errors import RewardError, choices


class Kind(NamedTuple):
    """The map from a cosine to a score: `scale * max(cos, 0)`, or `scale * cos` where `clamp` is false."""

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
        **options: Any,
    ) -> None:
        """Load the model; options that are not given take the class's defaults."""
        super().__init__(**options)
        self.kind = _kind(kind or self.default_kind, scale, prefix)
        self.prefix = self.kind.prefix
        self.range = (0.0 if self.kind.clamp else -self.kind.scale, self.kind.scale)
        self.version = f"{kind or self.default_kind}, scale {self.kind.scale:g}, prefix {self.prefix!r}"
        if weights is None and model is None and pretrained is None:
            weights = self.default_weights()
        if weights is None:
            model, pretrained = model or self.default_model, pretrained or self.default_pretrained
        self.use(load_encoder(weights, model=model, pretrained=pretrained))

    @classmethod
    def default_weights(cls) -> str | None:
        """Return the location of a preset's weights; called at load time, so that it may search for them."""
        return None

    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Apply the kind: scale, and clamp at zero."""
        return self.kind.scale * (cosine.clamp(min=0) if self.kind.clamp else cosine)


def _kind(kind: str, scale: float | None, prefix: str | None) -> Kind:
    if kind not in KINDS:
        raise RewardError(f"kind {kind!r} is unknown; {choices(kind, KINDS)}")
    base = KINDS[kind]
    return Kind(base.scale if scale is None else scale, base.prefix if prefix is None else prefix, base.clamp)
