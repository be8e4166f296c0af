"""VLM-RM: similarity of an image to a goal in words, with irrelevant features removed by a baseline.

Source: Rocamonde et al. 2024, "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning"
(arXiv:2310.12921), definition 1. With x the unit embedding of the image, g and b the means of the unit embeddings of
target and baseline prompts (as in the authors' code not scaled to length 1 again), d = g - b:

    r = 1 - |P (x - g)|^2 / 2,    P = alpha d d^T / |d|^2 + (1 - alpha) I

alpha = 0 is the plain goal distance, the cosine where g has length 1; alpha = 1 keeps the direction from baseline to
target alone. P is applied as a rank-one map, without building the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.backbones.load import load_encoder
from rewards.base import check_strings
from rewards.bases.encoder import EncoderReward
from rewards.errors import RewardError
from rewards.media import Media, read_media

MODEL, TAG = "ViT-bigG-14", "laion2b_s39b_b160k"


class VlmRm(EncoderReward):
    """Closeness of an image to a goal in words, with goal-baseline regularisation; in [-1, 1].

    target: the goal, a prompt or several whose embeddings are averaged; None takes `prompts`, one goal for each
    image. baseline: a prompt or several for the same scene without the goal; needs alpha. alpha: from 0 (none of it)
    to 1. weights, model, pretrained: as of the reward `clip`, by default the paper's best, open_clip's ViT-bigG-14.
    preprocessing: as in `rewards.backbones.preprocess`. Raises `RewardError` for a goal that equals the baseline.
    """

    name: ClassVar[str] = "vlm-rm"
    version = "alpha 0"
    licence = "Apache-2.0; weights: see their card"
    source = f"open_clip {MODEL}, {TAG}"
    citation = "Rocamonde et al. 2024, arXiv:2310.12921"

    def __init__(
        self,
        *,
        target: str | Sequence[str] | None = None,
        baseline: str | Sequence[str] | None = None,
        alpha: float | None = None,
        weights: str | PathLike[str] | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        **options: Any,
    ) -> None:
        """Load the model; the goal is embedded at the first call."""
        super().__init__(**options)
        self.target, self.baseline = _prompts("target", target), _prompts("baseline", baseline)
        if (alpha or 0) > 0 and self.baseline is None:
            raise RewardError(f"vlm-rm: alpha={alpha} needs a baseline: baseline='the scene without the goal'")
        if alpha is None and self.baseline is not None:
            raise RewardError("vlm-rm: a baseline needs alpha=, from 0 (none of it) to 1 (its direction alone)")
        self.alpha = float(alpha or 0)
        if not 0 <= self.alpha <= 1:
            raise RewardError(f"vlm-rm: alpha is {alpha}; a number from 0 to 1 is allowed")
        self.needs = frozenset({"prompts"}) if self.target is None else frozenset()
        if weights is None:
            model, pretrained = model or MODEL, pretrained or TAG
        self.use(load_encoder(weights, model=model, pretrained=pretrained))
        told = [f"{name} {said!r}" for name, said in (("target", self.target), ("baseline", self.baseline)) if said]
        self.version = ", ".join([f"alpha {self.alpha:g}", *told])

    def score(
        self,
        media: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare each image with the goal, or with its own prompt."""
        return self.closeness(self.media_embeddings(media), self._goals(prompts))

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Compare every image with every prompt as goal: `[B, P]` float32, each embedded once."""
        self._check_matrix(prompts)
        with torch.autocast(self.device.type, enabled=False):
            goals = self._goals(prompts)

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            return self.closeness(self.media_embeddings(chunk)[:, None], goals)

        return self._run(read_media(media, self.modality), row)

    def closeness(
        self, image: Float[Tensor, "*batch features"], goal: Float[Tensor, "*goals features"]
    ) -> Float[Tensor, " *both"]:
        """Apply the formula to unit embeddings of images and to goals, broadcast against each other."""
        away = image - goal
        squared = (1 - self.alpha) ** 2 * away.square().sum(-1)
        if self.alpha > 0:
            # |P a|^2 = (1 - alpha)^2 |a|^2 + (1 - (1 - alpha)^2) (a . d)^2 / |d|^2
            direction = goal - self.prompt_embeddings(self.baseline or []).mean(0)
            length = direction.square().sum(-1)
            if (length < 1e-12).any():
                raise RewardError(f"vlm-rm: a goal equals the baseline {self.baseline}; give a different baseline")
            squared = squared + (1 - (1 - self.alpha) ** 2) * (away * direction).sum(-1).square() / length
        return 1 - squared / 2

    def _goals(self, prompts: Sequence[str] | None) -> Float[Tensor, "goals features"]:
        if self.target is not None:
            return self.prompt_embeddings(self.target).mean(0, keepdim=True)
        assert prompts is not None, "declared in needs, and so checked before"
        return self.prompt_embeddings(prompts)


def _prompts(name: str, given: str | Sequence[str] | None) -> list[str] | None:
    if given is None:
        return None
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise RewardError(f"vlm-rm: {name} is an empty list; give at least one prompt")
    check_strings(prompts)
    return prompts
