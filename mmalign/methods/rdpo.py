"""rDPO and mDPO: DPO on answers, and on the media the chosen answer is about (Re-Align, arXiv 2502.13146).

The objective itself is `mmalign.losses.rdpo`, in the paper's form; with `anchor_weight: 1` it is mDPO
(arXiv 2406.11839). The other media are those of the data's rejected side, or the nearest of other pairs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.core.errors import UserError
from mmalign.core.progress import track
from mmalign.data.batches import VlmPairBatch
from mmalign.data.encoded.vlm_samples import VlmPairs
from mmalign.losses import dpo_logit, rdpo
from mmalign.methods.base import LossOutput, Needs
from mmalign.methods.completions import OfflinePairConfig, OfflinePairMethod, answer_metrics, with_answers
from mmalign.methods.noising import pair_accuracy
from mmalign.methods.run import VlmRun
from pipelines import media_features
from pipelines.vlm.batch import VlmSample


class RDPOConfig(OfflinePairConfig):
    """Configuration of `rdpo`; log-probabilities are sums over tokens."""

    beta: float = Field(0.1, gt=0)
    """how closely the policy is held to the reference, in every term"""
    visual_weight: float = Field(1.0, ge=0)
    """weight of the preference between media"""
    anchor_weight: float = Field(0.0, ge=0)
    """weight of mDPO's anchor, which keeps the chosen answer from becoming less likely; mDPO: 1"""
    unseen: Literal["retrieved", "column"] = "retrieved"
    """the media that the chosen answer is not about: those of another pair, nearest by the model's own vision
    features, or the data's rejected_video or rejected_image"""


class RDPO(OfflinePairMethod):
    """Prefer the chosen answer over the rejected one, and over itself given other, similar media."""

    name: ClassVar[str] = "rdpo"
    Config = RDPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True, modality="vlm")
    images_per_sample = 3

    def check_data(self, source: Any) -> None:
        """With `unseen: column`, refuse pairs whose rejected side has no media of its own."""
        missing = [name for name, own in zip(source.ids, source.own_media, strict=True) if not own]
        if self.config.unseen == "column" and missing:
            raise UserError(
                f"rdpo with unseen: column needs rejected_video or rejected_image, which {len(missing)} of "
                f"{len(source)} pairs of {source.name} lack ('{missing[0]}' first); or set unseen: retrieved"
            )

    def begin(self, run: VlmRun) -> None:
        """With `unseen: retrieved`, find the nearest other media of every pair by features of the initial model."""
        if self.config.unseen == "retrieved":
            self._nearest = dict(zip(run.samples.ids, nearest_others(run, run.samples), strict=True))
        super().begin(run)

    def sides(self, run: VlmRun, batch: VlmPairBatch) -> tuple[list[VlmSample], ...]:
        """Return the chosen answers, the rejected ones about the same media, and the chosen ones about the others."""
        return batch.chosen, with_answers(batch.chosen, batch.rejected), self._unseen(run, batch)

    def beside(self, run: VlmRun) -> list[str]:
        """Return which other media every pair has."""
        if self.config.unseen == "column":
            return super().beside(run)
        return [run.samples.media_ids[self._nearest[name]][0] for name in run.samples.ids]

    def describe(self) -> str:
        """Return the conventions: the scale of beta, the weights and the other media."""
        c = self.config
        weights = f"visual_weight={c.visual_weight:g}, anchor_weight={c.anchor_weight:g}"
        conventions = f"rdpo: beta={c.beta:g}, sums over tokens, no half factor, {weights}"
        return f"{conventions}, other media {c.unseen}, reference {c.reference}"

    def loss(self, run: VlmRun, batch: VlmPairBatch) -> LossOutput:
        """Return the mean loss; "visual_accuracy" is that of the preference between media."""
        c = self.config
        _, scored, referred = self.score(run, batch)
        policy, reference = _three(scored), _three(referred)
        each = rdpo(policy, reference, beta=c.beta, visual_weight=c.visual_weight, anchor_weight=c.anchor_weight)
        text = dpo_logit(*policy[:2], *reference[:2], beta=c.beta)
        visual = dpo_logit(policy[0], policy[2], reference[0], reference[2], beta=c.beta).detach()
        metrics = answer_metrics(policy, reference, text)
        metrics |= {"visual_accuracy": pair_accuracy(visual), "visual_logit": visual.mean()}
        return LossOutput(each.mean(), metrics)

    def _unseen(self, run: VlmRun, batch: VlmPairBatch) -> list[VlmSample]:
        """Return the chosen answers about the other media."""
        if self.config.unseen == "column":
            return with_answers(batch.rejected, batch.chosen)
        others = [run.samples.media(self._nearest[name]) for name in batch.ids]
        asked = [
            run.model.encode_prompt(prompt, other.media, fps=other.fps)
            for prompt, other in zip(batch.prompts, others, strict=True)
        ]
        return with_answers(asked, batch.chosen)


def _three(sides: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected, unseen = sides
    return chosen, rejected, unseen


@torch.no_grad()
def nearest_others(run: VlmRun, pairs: VlmPairs) -> list[int]:
    """Return for every pair the index of the pair whose media differ and have the most similar vision features.

    Similarity is the cosine; among equal cosines the first pair wins. Byte-identical media are not other media.

    Raises:
        UserError: all pairs are about the same media.
    """
    first = {media: index for index, (media, _) in reversed(list(enumerate(pairs.media_ids)))}
    distinct = sorted(index for index in first.values() if pairs.usable(index))
    if len(distinct) < 2:
        raise UserError("rdpo with unseen: retrieved needs pairs about at least two different media")
    features = []
    with track(len(distinct), "look at media", unit="media") as job, run.autocast():
        for index in distinct:
            features.append(media_features(run.model, [pairs.media(index).media]).cpu())
            job.advance(1)
    unit = normalize(torch.cat(features).float(), dim=-1)
    nearest = {}
    for row, index in enumerate(distinct):
        cosines = unit @ unit[row]
        cosines[row] = -torch.inf
        nearest[index] = distinct[int(cosines.argmax())]
    # Pairs that are left out have no features; others stand in for them in every batch.
    return [nearest.get(first[media], distinct[0]) for media, _ in pairs.media_ids]
