"""How alike the frames of a video are in the embeddings of any CLIP: VBench's consistency with the CLIP at hand.

The formula is VBench's (`rewards.vbench`), the embeddings those of another reward, preprocessed as it does; with
CLIP ViT-B/32 it is close to `vbench-background-consistency`, which resizes frames as VBench's code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from rewards.base import Reward
from rewards.bases.derived import load_inner
from rewards.bases.two_tower import TwoTowerReward
from rewards.errors import RewardError
from rewards.vbench import CITATION, consistency


class FrameConsistency(Reward):
    """Similarity of the frames of a video in the image embeddings of any CLIP, SigLIP or ALIGN; in [0, 1].

    by: an image reward that embeds images, such as `clip`, `pickscore` or `shapes-clip`: its name, its options as a
    mapping with `name`, or a reward. A video without motion scores 1, so look at what measures motion too.
    """

    name: ClassVar[str] = "frame-consistency"
    modality = "video"
    version = "clip"
    differentiable = True
    range = (0.0, 1.0)
    licence = "Apache-2.0; embeddings: their own"
    source = "those of the reward that embeds, `clip` by default"
    citation = CITATION
    least_frames = 2

    def __init__(self, *, by: Any = "clip", batch_size: int = 4, **options: Any) -> None:
        """Load the reward that embeds."""
        super().__init__(batch_size=batch_size, **options)
        inner = load_inner(by, {"device": self.device, "dtype": self.dtype})
        if not isinstance(inner, TwoTowerReward) or inner.modality != "image":
            raise RewardError(f"frame-consistency: by {inner.name!r} embeds no images; give clip or another that does")
        self.inner, self.source, self.files = inner, inner.source, inner.files
        self.version = f"{inner.name} {inner.version}"

    def score(
        self,
        media: Float[Tensor, "batch frames 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare the embeddings of every frame with those of its predecessor and of the first."""
        if media.shape[1] < self.least_frames:
            raise RewardError("frame-consistency: a video of 1 frame; at least 2 are needed")
        features = self.inner.media_embeddings(media.flatten(0, 1))
        return consistency(features.unflatten(0, media.shape[:2]))
