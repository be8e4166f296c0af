"""DPO on answers of vision-language models (arXiv 2305.18290); the objective itself is `mmalign.losses.dpo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.batches import VlmPairBatch
from mmalign.losses import beta_of_gap, chosen_anchor, dpo, dpo_logit, sft
from mmalign.methods.base import LossOutput, Needs, PairLossConfig
from mmalign.methods.completions import OfflinePairConfig, OfflinePairMethod, answer_metrics
from mmalign.methods.run import VlmRun
from pipelines.vlm.batch import VlmSample


class VlmDPOConfig(PairLossConfig, OfflinePairConfig):
    """Configuration of `vlm_dpo`; log-probabilities are sums over the tokens of an answer, the end token included."""

    renamed: ClassVar[Mapping[str, str]] = {
        "margin_rise": "dynamic_beta_scale",
        "margin_slope": "dynamic_beta_slope",
    }
    beta: float = Field(0.1, gt=0)
    """how closely the policy is held to the reference"""
    length_normalised: bool = False
    """means over tokens instead of sums; beta is then usually ten times as large or more"""
    sft_weight: float = Field(0.0, ge=0)
    """adds this many times the cross-entropy of the chosen answer, a mean over its tokens"""
    anchor_weight: float = Field(0.0, ge=0)
    """adds this many times mDPO's anchor, which keeps the chosen answer from becoming less likely"""
    dynamic_beta_scale: float = Field(0.0, ge=0)
    """MM-DPO's beta of each pair: up to (1 + this) times beta for a large `margin` of the data (published: 0.5)"""
    dynamic_beta_slope: float = Field(0.5, gt=0)
    """how fast beta rises with the margin, if `dynamic_beta_scale` is not 0"""


class VlmDPO(OfflinePairMethod):
    """Prefer the chosen answer over the rejected one, relative to the frozen starting point."""

    name: ClassVar[str] = "vlm_dpo"
    Config = VlmDPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True, modality="vlm")
    images_per_sample = 2

    def check_data(self, source: Any) -> None:
        """Refuse pairs without margins where beta depends on them."""
        missing = [name for name, margin in zip(source.ids, source.margins(), strict=True) if margin != margin]
        if self.config.dynamic_beta_scale and missing:
            raise UserError(
                f"{self.name}: dynamic_beta_scale needs the column margin, which {len(missing)} of "
                f"{len(source)} pairs of {source.name} lack ('{missing[0]}' first); fill it in, "
                "or remove dynamic_beta_scale"
            )

    def sides(self, run: VlmRun, batch: VlmPairBatch) -> tuple[list[VlmSample], ...]:
        """Return the chosen and the rejected answers."""
        return batch.chosen, batch.rejected

    def describe(self) -> str:
        """Return the conventions: the scale of beta and the weights of further terms."""
        c = self.config
        extras = [c.loss_type, "means over tokens" if c.length_normalised else "sums over tokens"]
        extras += [f"{name}={getattr(c, name):g}" for name in _WEIGHTS if getattr(c, name)]
        return f"{self.name}: beta={c.beta:g}, no half factor, {', '.join(extras)}, reference {c.reference}"

    def loss(self, run: VlmRun, batch: VlmPairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the log-probabilities of both models on both answers."""
        c = self.config
        values, policy, reference = self.score(run, batch, mean=c.length_normalised)
        beta: float | Tensor = c.beta
        if c.dynamic_beta_scale:
            assert batch.margins is not None, "check_data has seen a margin for every pair"
            beta = beta_of_gap(batch.margins, beta=c.beta, rise=c.dynamic_beta_scale, slope=c.dynamic_beta_slope)
        each = dpo(*policy, *reference, beta=beta, loss_type=c.loss_type, label_smoothing=c.label_smoothing)
        if c.sft_weight:
            log_probs, mask = values
            each = each + c.sft_weight * sft(log_probs, mask)[: len(batch)]
        if c.anchor_weight:
            each = each + c.anchor_weight * chosen_anchor(policy[0], reference[0], beta=beta)
        logit = dpo_logit(*policy, *reference, beta=beta)
        return LossOutput(each.mean(), answer_metrics(policy, reference, logit))


_WEIGHTS = ("label_smoothing", "sft_weight", "anchor_weight", "dynamic_beta_scale")
