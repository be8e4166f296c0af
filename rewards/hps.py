"""HPS v2 and v2.1: a CLIP ViT-H/14 fine-tuned on expert comparisons of generated images.

Source: Wu et al. 2023, "Human Preference Score v2" (arXiv:2306.09341). The score is the bare cosine of the embeddings,
without a logit scale; the authors' tables show 100 times its mean. Images are not cropped: the longer edge is resized
to 224 and the rest padded with black.

| version | weights | scores |
|---|---|---|
| `v2` | HPS_v2_compressed.pt | about 0.24 to 0.29 |
| `v2.1` | HPS_v2.1_compressed.pt, more and cleaner data | about 0.14 to 0.33 |

Scores of different versions, or of different prompts, are not comparable. HPSv3 is the reward `hps-v3`.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

from rewards.backbones.open_clip_encoder import load_open_clip
from rewards.backbones.preprocess import Preprocess
from rewards.backbones.weights import Weights, locate
from rewards.bases.encoder import EncoderReward
from rewards.errors import RewardError, choices

REPOSITORY = "xswu/HPSv2"
VERSIONS = {
    "v2": Weights(REPOSITORY, "HPS_v2_compressed.pt"),
    "v2.1": Weights(REPOSITORY, "HPS_v2.1_compressed.pt"),
}


class Hps(EncoderReward):
    """Human preference for an image given its prompt, by HPS v2 or v2.1: a cosine, compared within one prompt only.

    version: `v2.1` (the default) or `v2`; part of the metric's name wherever scores are reported. weights: the
    published file, a safetensors file with the same names, or a directory that holds the published one. Prompts have
    no template and are cut at 77 tokens, with one warning. preprocessing: as in `rewards.backbones.preprocess`. Raises
    `RewardError` for an unknown version and for weights of another model.
    """

    name: ClassVar[str] = "hps"
    version = "v2.1"
    licence = "Apache-2.0"
    source = f"{REPOSITORY}, HPS_v2.1_compressed.pt"
    citation = "Wu et al. 2023, arXiv:2306.09341"
    files = (VERSIONS["v2.1"],)

    # By open_clip's name: plain GELU, as the LAION-2B weights that it was tuned from.
    architecture: ClassVar[str] = "ViT-H-14"

    def __init__(self, *, version: str = "v2.1", weights: str | PathLike[str] | None = None, **options: Any) -> None:
        """Load the checkpoint, once, straight into the architecture."""
        super().__init__(**options)
        if version not in VERSIONS:
            raise RewardError(f"hps: version {version!r} is unknown; {choices(version, VERSIONS)}; v3 is 'hps-v3'")
        encoder = load_open_clip(locate(VERSIONS[version], weights), model=self.architecture)
        encoder.preprocess = Preprocess(encoder.preprocess.size, resize="longest", fill=0.0)
        self.version, self.files = version, (VERSIONS[version],)
        self.use(encoder)
