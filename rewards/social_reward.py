"""Social Reward: a CLIP ViT-L/14 fine-tuned on which images users of a creative community chose to edit.

Source: Isajanyan et al. 2024, "Social Reward: Evaluating and Enhancing Generative AI through Million-User Feedback
from an Online Creative Community" (arXiv:2402.09872). The score is the cosine of image and prompt; OpenAI's ViT-L/14
was tuned by a triplet loss with margin 0.3 (the upper visual and text blocks and the text projection). The authors
published no weights: this is the architecture, for a checkpoint of one's own.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from rewards.clip import ClipReward
from rewards.errors import RewardError


class SocialReward(ClipReward):
    """Agreement of image and prompt by a CLIP ViT-L/14 fine-tuned as Social Reward; weights must be given.

    weights: a state dict of OpenAI's ViT-L/14 (a file), or a whole CLIP as of the reward `clip`. Other options as of
    `clip`. Raises `RewardError` without weights, as none are published.
    """

    name: ClassVar[str] = "social-reward"
    licence = "weights: not published"
    source = "none published: give weights="
    citation = "Isajanyan et al. 2024, arXiv:2402.09872"

    default_model: ClassVar[str] = "ViT-L-14-quickgelu"

    def __init__(
        self, *, weights: str | PathLike[str] | None = None, model: str | None = None, **options: Any
    ) -> None:
        """Load the weights; a file holds those of ViT-L/14 unless `model` says otherwise."""
        if weights is None:
            raise RewardError(
                "social-reward: no weights are published; give weights=PATH of a CLIP ViT-L/14 that was fine-tuned "
                "this way"
            )
        if model is None and Path(weights).expanduser().is_file():
            model = self.default_model
        super().__init__(weights=weights, model=model, **options)
