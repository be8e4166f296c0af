"""lambda-Harmonic reward: similarity to reference images combined with fit to the prompt, and RPO's labels from it.

Source: Miao et al. 2024, "Subject-driven Text-to-Image Generation via Preference-based Reinforcement Learning" (RPO,
NeurIPS 2024), there with ALIGN. With s = (cos + 1) / 2 in [0, 1], the image similarity a mean over the references:

    r = 1 / (lambda / (s_image + 1e-8) + (1 - lambda) / (s_text + 1e-8)),    0 < r <= 1

A harmonic mean is small where either part is: similarity cannot compensate for ignoring the prompt. lambda = 1 is
likeness alone, 0 the prompt alone. The labels of a pair are drawn, P(first preferred) = sigmoid(r_first - r_second),
which lies in [0.27, 0.73]. Lambda is one number in the paper; the authors' code uses it for validation only (0.3) and
labels with 0, so that `lambda_labels` is an option of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rewards.base import Reward
from rewards.bases.derived import inherit_facts, load_inner
from rewards.bases.references import mean_embeddings
from rewards.clip import ClipReward
from rewards.errors import RewardError
from rewards.media import Media

ALIGN = "kakaobrain/align-base"
EPS = 1e-8


def harmonic(image: Float[Tensor, " *shape"], text: Float[Tensor, " *shape"], lam: float) -> Float[Tensor, " *shape"]:
    """Weighted harmonic mean of two similarities in [0, 1], `lam` being the weight of the first."""
    return 1 / (lam / (image + EPS) + (1 - lam) / (text + EPS))


class LambdaHarmonic(Reward):
    """Harmonic mean of similarity to reference images and agreement with the prompt, in (0, 1].

    weights: the two-tower model of both similarities, as of the reward `clip`, by default ALIGN. image, text: other
    rewards for either (a name, or a mapping with `name` and options), such as `dino-i` and `clip`; each must have
    a bounded range, which is mapped to [0, 1]. lambda_validation: weight of the likeness in the score;
    lambda_labels: in `labels` and their probabilities, by default the same. token: the subject's placeholder, taken
    out of prompts; None leaves them as they are. preprocessing: as in `rewards.backbones.preprocess`, of `weights`
    alone.
    """

    name: ClassVar[str] = "lambda-harmonic"
    version = "lambda 0.3"
    needs = frozenset({"prompts", "references"})
    differentiable = True
    range = (0.0, 1.0)
    licence = "Apache-2.0; weights: see their card"
    source = ALIGN
    citation = "Miao et al. 2024, NeurIPS (RPO); Jia et al. 2021, arXiv:2102.05918 (ALIGN)"

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        image: str | Mapping[str, Any] | Reward | None = None,
        text: str | Mapping[str, Any] | Reward | None = None,
        lambda_validation: float = 0.3,
        lambda_labels: float | None = None,
        token: str | None = "[V]",
        preprocessing: str = "differentiable",
        **options: Any,
    ) -> None:
        """Load the model, or the rewards that take its place."""
        super().__init__(**options)
        self.lam = _lambda("lambda_validation", lambda_validation)
        self.lambda_labels = self.lam if lambda_labels is None else _lambda("lambda_labels", lambda_labels)
        self.token = token
        common: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.towers: ClipReward | None = None
        self.image: Reward | None = None
        self.text: Reward | None = None
        if image is None or text is None:
            self.towers = ClipReward(weights=weights or ALIGN, preprocessing=preprocessing, **common)
        elif weights is not None:
            raise RewardError("lambda-harmonic: image= and text= are given, so weights= is not used; remove weights=")
        if image is not None:
            self.image = _checked("image", load_inner(image, common), "references")
        if text is not None:
            self.text = _checked("text", load_inner(text, common), "prompts")
        inner = [reward for reward in (self.image, self.text) if reward is not None]
        inherit_facts(self, [*inner, *([] if self.towers is None else [self.towers])])
        self.needs = frozenset({"prompts", "references"})
        self.derived_from = frozenset().union(*({reward.name} | reward.derived_from for reward in inner))
        self._state_version()

    def similarities(
        self, media: Float[Tensor, "batch 3 height width"], prompts: Sequence[str], references: Sequence[Tensor]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return similarity to the prepared references and agreement with the prompts, both in [0, 1]."""
        prompts = [without_token(prompt, self.token) for prompt in prompts]
        embedded = None if self.towers is None else self.towers.media_embeddings(media)
        if self.image is None:
            assert embedded is not None
            likeness = (embedded * torch.stack(list(references))).sum(-1) / 2 + 0.5
        else:
            likeness = _to_unit_interval(self.image, self.image.score(media, None, references))
        if self.text is None:
            assert embedded is not None and self.towers is not None
            return likeness, (embedded * self.towers.prompt_embeddings(prompts)).sum(-1) / 2 + 0.5
        return likeness, _to_unit_interval(self.text, self.text.score(media, prompts, None))

    def prepare_references(self, references: list[Tensor]) -> list[Tensor]:
        """Embed the references once before the micro-batches, by the reward that measures similarity."""
        if self.image is not None:
            return self.image.prepare_references(references)
        assert self.towers is not None
        return mean_embeddings(references, self.towers.encode_media, self.batch_size, self.device)

    def score(
        self,
        media: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Return the harmonic mean for validation."""
        assert prompts is not None and references is not None, "declared in needs, and so checked before"
        return harmonic(*self.similarities(media, prompts, references), self.lam)

    def at(self, lam: float) -> LambdaHarmonic:
        """Return this reward with another lambda, on the same weights."""
        other = copy.copy(self)
        other.lam = _lambda("lam", lam)
        other._state_version()
        return other

    def label_probabilities(
        self, first: Media, second: Media, *, prompts: Sequence[str], references: Sequence[Tensor] | Tensor
    ) -> Float[Tensor, " batch"]:
        """Return P(first preferred to second), `sigmoid(r_first - r_second)` with the lambda of labels."""
        margin = self.at(self.lambda_labels).pairwise(first, second, prompts=prompts, references=references)
        return margin.sigmoid()

    def labels(
        self,
        first: Media,
        second: Media,
        *,
        prompts: Sequence[str],
        references: Sequence[Tensor] | Tensor,
        generator: torch.Generator,
    ) -> Bool[Tensor, " batch"]:
        """Sample for each pair whether the first is preferred; RPO samples again each time that a pair is used.

        generator: of random numbers on the CPU; the draws depend on its seed and on nothing else.
        """
        probabilities = self.label_probabilities(first, second, prompts=prompts, references=references)
        drawn = torch.rand(len(probabilities), generator=generator, dtype=torch.float64)
        return drawn.to(probabilities.device) < probabilities

    def _state_version(self) -> None:
        parts = [f"{part} {r.name} ({r.version})" for part, r in (("image", self.image), ("text", self.text)) if r]
        self.version = ", ".join([f"lambda {self.lam:g}", *parts])


def without_token(prompt: str, token: str | None) -> str:
    """Remove the subject's placeholder from a prompt: "a [V] dog" becomes "a dog"."""
    return " ".join(prompt.replace(token, " ").split()) if token and token in prompt else prompt


def _lambda(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise RewardError(
            f"lambda-harmonic: {name} is {value}; a number from 0 (prompt only) to 1 (similarity only) is allowed"
        )
    return float(value)


def _checked(option: str, reward: Reward, need: str) -> Reward:
    low, high = reward.range
    if reward.needs != {need}:
        raise RewardError(
            f"lambda-harmonic: {option}={reward.name!r} needs {sorted(reward.needs)}; it may need {need}"
        )
    if not math.isfinite(high - low) or not reward.higher_is_better:
        raise RewardError(
            f"lambda-harmonic: {option}={reward.name!r} has the range {reward.range}; a similarity between two "
            "bounds, where higher is better, is expected"
        )
    return reward


def _to_unit_interval(reward: Reward, scores: Tensor) -> Tensor:
    low, high = reward.range
    return (scores - low) / (high - low)
