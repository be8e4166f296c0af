"""Scoring pairs of answers, shared by the methods for vision-language models.

All sides of a pair go through a network in one call, one side of the whole batch after the other, chosen first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.batches import VlmPairBatch
from mmalign.losses import completion_mean, completion_sum
from mmalign.methods.base import Method, MethodConfig
from mmalign.methods.noising import pair_accuracy
from mmalign.methods.reference import TokenValues
from mmalign.methods.run import VlmRun
from pipelines.vlm.batch import VlmBatch, VlmSample


def collate(run: VlmRun, *sides: Sequence[VlmSample]) -> VlmBatch:
    """Return the samples of all sides, one side after the other, as one batch on the model's device."""
    batch: VlmBatch = run.model.collate([sample for side in sides for sample in side])
    return batch


def reduce_sides(values: TokenValues, sides: int, *, mean: bool = False) -> tuple[Float[Tensor, " pairs"], ...]:
    """Return the sum over the tokens of every answer, or their mean, as one tensor for each side."""
    log_probs, mask = values
    return (completion_mean if mean else completion_sum)(log_probs, mask).chunk(sides)


def with_answers(asked: Sequence[VlmSample], answered: Sequence[VlmSample]) -> list[VlmSample]:
    """Return the prompts and media of `asked` with the answers of `answered`."""
    return [one.with_completion(other.completion_ids.tolist()) for one, other in zip(asked, answered, strict=True)]


def token_log_probs(
    logits: Float[Tensor, "batch tokens vocabulary"], batch: VlmBatch
) -> Float[Tensor, "batch tokens"]:
    """Return the log-probability of every completion token, from the logits that predict it."""
    taken = logits.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    return torch.where(batch.token_mask, taken - logits.logsumexp(-1), 0.0)


def answer_metrics(
    policy: Sequence[Tensor], reference: Sequence[Tensor], logit: Float[Tensor, " pairs"]
) -> dict[str, Tensor]:
    """Return the metrics of a loss on two sides; the log-probs are logged because their difference can mislead.

    A logit can rise while both answers become less likely: `policy_chosen` must not fall far below
    `reference_chosen`.
    """
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    values = (*policy[:2], *reference[:2])
    means = {name: value.detach().mean() for name, value in zip(names, values, strict=True)}
    return {"accuracy": pair_accuracy(logit.detach()), "logit": logit.detach().mean(), **means}


class OfflinePairConfig(MethodConfig):
    """Base of the configurations of methods that compare the same answers about the same media in every epoch."""

    reference: Literal["live", "precomputed"] = "live"
    """live: evaluate the reference at every step; precomputed: once before training, kept on disk"""


class OfflinePairMethod(Method[Any]):
    """Base of methods on fixed pairs of answers; the reference's log-probs can be computed once before training."""

    _stored: dict[str, Float[Tensor, " sides"]] | None = None

    @abstractmethod
    def sides(self, run: VlmRun, batch: VlmPairBatch) -> tuple[list[VlmSample], ...]:
        """Return the answers that are compared, `images_per_sample` sides, chosen answers first."""

    def beside(self, run: VlmRun) -> list[str]:
        """Return what identifies the sides of every pair in addition to the pair itself."""
        return [""] * len(run.samples)

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is evaluated at every step."""
        return bool(self.config.reference == "live")

    def begin(self, run: VlmRun) -> None:
        """Precompute the reference's log-probs on all data, if the configuration says so."""
        if self.keeps_reference:
            return

        @torch.no_grad()
        def sums(batch: VlmPairBatch) -> Tensor:
            # Nothing is trained yet: the policy is the reference.
            sides = self.sides(run, batch)
            return torch.stack(reduce_sides(run.log_probs(collate(run, *sides)), len(sides)), 1).cpu()

        stored = run.samples.reference_sums(sums, self.images_per_sample, self.beside(run))
        self._stored = dict(zip(run.samples.ids, stored, strict=True))

    def score(
        self, run: VlmRun, batch: VlmPairBatch, *, mean: bool = False
    ) -> tuple[TokenValues, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the policy's log-probs of all tokens, and the sums (or means) of both models for each side."""
        sides = self.sides(run, batch)
        collated = collate(run, *sides)
        values = run.log_probs(collated)
        policy = reduce_sides(values, len(sides), mean=mean)
        if self._stored is None:
            return values, policy, reduce_sides(run.reference.log_probs(collated), len(sides), mean=mean)
        sums = torch.stack([self._stored[name] for name in batch.ids]).to(values[0]).T
        counts = values[1].sum(1).chunk(len(sides))
        return values, policy, tuple(one / count if mean else one for one, count in zip(sums, counts, strict=True))
