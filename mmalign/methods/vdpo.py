"""VDPO: prefer the chosen answer given the media over the same answer given perturbed media (arXiv 2504.05810).

The objective and the choice between perturbations are `mmalign.losses.vdpo` and `select_by_divergence`. The data's
rejected answers are not used.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmalign.core.errors import UserError
from mmalign.core.seeds import derive_seed
from mmalign.data.batches import TimedMedia, VlmPairBatch
from mmalign.data.video.operators import get_operator
from mmalign.losses import chosen_anchor, completion_mean, dpo_logit, select_by_divergence, token_jsd, vdpo
from mmalign.methods.base import LossOutput, Method, MethodConfig, Needs
from mmalign.methods.completions import answer_metrics, collate, reduce_sides, with_answers
from mmalign.methods.run import VlmRun
from pipelines import media_features
from pipelines.vlm.batch import VlmSample


class VDPOConfig(MethodConfig):
    """Configuration of `vdpo`; log-probabilities are sums over tokens."""

    beta: float = Field(0.1, gt=0)
    """how closely the policy is held to the reference"""
    selection: Literal["random", "jsd"] = "jsd"
    """random: one random perturbation; jsd: the one with the largest divergence of the answer, weighted by it"""
    operators: list[str] = Field(["reverse", "block_shuffle", "crop", "mask", "hue"], min_length=1)
    """perturbations to draw from, by their names in `mmalign.data.video.operators`; options are written after the
    name, as in "crop:area=0.1..0.3" """
    candidates: int = Field(4, ge=2)
    """perturbed versions of each sample that `jsd` selects from"""
    least_relevance: float = Field(0.5, ge=-1, le=1)
    """`jsd` passes over versions whose vision features have a smaller cosine to the media's"""
    full_weight_at: float = Field(0.05, gt=0)
    """divergence in nats from which a pair has the full weight, with `jsd`"""
    anchor_weight: float = Field(0.0, ge=0)
    """adds this many times mDPO's anchor, which keeps the chosen answer from becoming less likely"""


class VDPO(Method[VDPOConfig]):
    """Prefer an answer about the media over the same answer about perturbed media."""

    name: ClassVar[str] = "vdpo"
    Config = VDPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True, modality="vlm")
    images_per_sample = 2

    def check_data(self, source: Any) -> None:
        """Refuse operators that do not exist or need other media, and operators on frames for data with images."""
        image = next((name for name, kind in zip(source.ids, source.kinds, strict=True) if kind == "image"), None)
        for operator in map(get_operator, self.config.operators):
            if operator.name == "neighbour":
                raise UserError(
                    "vdpo: the operator neighbour needs media of other pairs; use rdpo with unseen: retrieved"
                )
            if operator.temporal and image is not None:
                raise UserError(f"vdpo: {operator.name} re-orders frames, and pair '{image}' is about an image")

    def describe(self) -> str:
        """Return the conventions: the scale of beta and the perturbations."""
        c = self.config
        of = f"jsd of {c.candidates}" if c.selection == "jsd" else c.selection
        return f"vdpo: beta={c.beta:g}, sums over tokens, no half factor, perturbation {of} ({', '.join(c.operators)})"

    def loss(self, run: VlmRun, batch: VlmPairBatch) -> LossOutput:
        """Return the mean loss; of the metrics, "rejected" is the chosen answer given the perturbed media."""
        c = self.config
        perturbed, weight = self._perturbed(run, batch)
        sides = collate(run, batch.chosen, perturbed)
        policy = reduce_sides(run.log_probs(sides), 2)
        reference = reduce_sides(run.reference.log_probs(sides), 2)
        each = vdpo(*policy, *reference, beta=c.beta, weight=weight)
        if c.anchor_weight:
            each = each + c.anchor_weight * chosen_anchor(policy[0], reference[0], beta=c.beta)
        metrics = answer_metrics(policy, reference, dpo_logit(*policy, *reference, beta=c.beta))
        return LossOutput(each.mean(), metrics if weight is None else {**metrics, "weight": weight.mean()})

    def _perturbed(self, run: VlmRun, batch: VlmPairBatch) -> tuple[list[VlmSample], Float[Tensor, " batch"] | None]:
        """Return the chosen answers with the selected perturbed media, and the weights of the pairs."""
        c = self.config
        media = [decode() for decode in batch.media]
        count = c.candidates if c.selection == "jsd" else 1
        bags = [self._bag(run, one, name, batch.epoch, count) for one, name in zip(media, batch.ids, strict=True)]
        asked = [
            [run.model.encode_prompt(prompt, bag[k].media, fps=bag[k].fps) for k in range(count)]
            for prompt, bag in zip(batch.prompts, bags, strict=True)
        ]
        samples = [with_answers(row, [one] * count) for row, one in zip(asked, batch.chosen, strict=True)]
        if c.selection == "random":
            return [row[0] for row in samples], None
        with torch.no_grad():
            relevance = self._relevance(run, media, bags)
            divergence = self._divergence(run, batch.chosen, samples)
        index, weight = select_by_divergence(
            divergence, relevance, least_relevance=c.least_relevance, full_weight_at=c.full_weight_at
        )
        return [row[k] for row, k in zip(samples, index.tolist(), strict=True)], weight

    def _bag(self, run: VlmRun, media: TimedMedia, name: str, epoch: int, count: int) -> list[TimedMedia]:
        """Return perturbed versions of one sample's media: all operators once, in random order, then again."""
        names = self.config.operators
        order = torch.randperm(len(names), generator=run.random("perturb", name, epoch)).tolist()
        bag = []
        for k in range(count):
            operator = get_operator(names[order[k % len(names)]])
            seed = derive_seed(run.seed, "perturb", name, epoch, k)
            bag.append(TimedMedia(tuple(torch.as_tensor(operator(one, seed=seed)) for one in media.media), media.fps))
        return bag

    def _relevance(self, run: VlmRun, media: list[TimedMedia], bags: list[list[TimedMedia]]) -> Tensor:
        """Return the cosine of each candidate's features to those of the media, from the frozen vision tower."""
        rows = [[own.media, *(one.media for one in bag)] for own, bag in zip(media, bags, strict=True)]
        with run.reference.active(), run.autocast():
            features = torch.stack([media_features(run.model, row) for row in rows])
        return cosine_similarity(features[:, :1], features[:, 1:], dim=-1)

    def _divergence(self, run: VlmRun, chosen: list[VlmSample], samples: list[list[VlmSample]]) -> Tensor:
        """Return the mean `token_jsd` between the policy's predictions of the answer given media and candidate."""
        clean = collate(run, chosen)
        expected, mask = run.logits(clean), clean.token_mask
        moved = (run.logits(collate(run, column)) for column in map(list, zip(*samples, strict=True)))
        return torch.stack([completion_mean(token_jsd(expected, one), mask) for one in moved], 1)
