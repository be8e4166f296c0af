"""RRPO: preference on the tokens in which answers differ, with a KL penalty on the chosen one (arXiv 2504.12083).

The objective itself is `mmalign.losses.rrpo`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from mmalign.core.errors import UserError
from mmalign.data.batches import VlmPairBatch
from mmalign.losses import completion_sum, rrpo, rrpo_logit, span_masks, token_kl
from mmalign.methods.base import LossOutput, Method, MethodConfig, Needs
from mmalign.methods.completions import answer_metrics, collate, reduce_sides, token_log_probs
from mmalign.methods.run import VlmRun


class RRPOConfig(MethodConfig):
    """Configuration of `rrpo`; sums over tokens, the divergence in nats and not scaled by beta."""

    beta: float = Field(0.1, gt=0)
    """how closely the policy is held to the reference on the tokens that differ"""
    alpha: float = Field(0.01, ge=0)
    """weight of the divergence from the reference on the chosen answer, a sum over its tokens"""


class RRPO(Method[RRPOConfig]):
    """Prefer the spans in which the chosen answer differs, with a KL penalty on the whole answer."""

    name: ClassVar[str] = "rrpo"
    Config = RRPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True, modality="vlm")
    images_per_sample = 2

    def check_data(self, source: Any) -> None:
        """Refuse pairs whose two answers are equal, which give no gradient."""
        same = [name for name, equal in zip(source.ids, source.same_answers, strict=True) if equal]
        if same:
            raise UserError(
                f"rrpo learns from differing answers, and {len(same)} pairs of {source.name} have one answer "
                f"about two media ('{same[0]}' first); use vlm_dpo or rdpo for them"
            )

    def describe(self) -> str:
        """Return the conventions: the scale of beta and the KL penalty."""
        c = self.config
        return (
            f"rrpo: beta={c.beta:g} on differing tokens, sums, no half factor, + {c.alpha:g} KL(reference || policy)"
        )

    def loss(self, run: VlmRun, batch: VlmPairBatch) -> LossOutput:
        """Return the mean loss of the pairs; `distance` is the divergence, a sum over the chosen answer's tokens."""
        c = self.config
        sides = collate(run, batch.chosen, batch.rejected)
        logits, reference_logits = run.logits(sides), run.reference.logits(sides)
        mask, ids = sides.token_mask, sides.completion_ids
        policy, reference = token_log_probs(logits, sides), token_log_probs(reference_logits, sides)
        chosen, rejected = slice(len(batch)), slice(len(batch), None)
        differs = span_masks(ids[chosen], mask[chosen], ids[rejected], mask[rejected])
        z = rrpo_logit(policy[chosen], policy[rejected], reference[chosen], reference[rejected], *differs, beta=c.beta)
        divergence = token_kl(reference_logits[chosen], logits[chosen])
        loss = rrpo(z, divergence, mask[chosen], alpha=c.alpha).mean()
        metrics = answer_metrics(reduce_sides((policy, mask), 2), reduce_sides((reference, mask), 2), z)
        metrics["distance"] = completion_sum(divergence.detach(), mask[chosen]).mean()
        metrics["differing_tokens"] = torch.cat(differs).sum(1).float().mean()
        return LossOutput(loss, metrics)
