"""SmPO: preferences smoothed by a reward, on inverted images (arXiv 2506.02698); objective: `mmalign.losses.smpo`."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmalign.core.errors import UserError
from mmalign.losses import diffusion_dpo_logit, smpo, smpo_weight
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch
from mmalign.methods.noising import InversionConfig, invert_pairs, noise_pairs, pair_metrics
from mmalign.methods.run import Run
from pipelines.noise import NoiseProcess

if TYPE_CHECKING:
    from mmalign.data.pairs import PairTable

SATURATED = 0.95
"""A weight of more than this share of gamma is as good as the largest."""


class SmPOConfig(InversionConfig):
    """Configuration of `smpo`; beta as in `diffusion_dpo`: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference, at weight 1"""
    gamma: float = Field(10.0, gt=0)
    """the largest weight of a pair"""
    scale: float | None = Field(None, gt=0)
    """margin of the pairs' scores at which a weight is 0.46 gamma; null: the largest score of the data less the
    smallest, as in the paper's code (0.16658 there, for PickScore as a cosine)"""
    noising: Literal["inversion", "gaussian"] = "inversion"
    """how images are noised: by inversion with the policy, or by random noise that both sides share"""
    renoise: int = Field(1, ge=0)
    """how often a step of the inversion is refined; 0: plain DDIM inversion"""
    inversion_steps: int = Field(9, ge=1)
    """steps of the inversion: 9 in the paper, 5 (SD1.5) or 10 (SDXL) in its code"""


class SmPO(Method[SmPOConfig]):
    """Prefer the image with the higher reward, weighted by the reward margin; pairs of equal reward have weight 0."""

    name: ClassVar[str] = "smpo"
    Config = SmPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True)
    images_per_sample = 2

    def check(self, process: NoiseProcess) -> None:
        """Refuse timesteps or an inversion that the schedule does not support."""
        super().check(process)
        process.check_steps(self.config.inversion_steps)

    def __init__(self, config: SmPOConfig) -> None:
        """Keep the configuration; without a scale, `check_data` finds it."""
        super().__init__(config)
        self.scale = config.scale

    def check_data(self, source: PairTable) -> None:
        """Find the scale if none is given; refuse pairs without scores, and a scale that makes most weights alike."""
        margins = [abs(margin) for margin in source.require_margins(self.name)]
        low, high = source.score_range
        if self.scale is None and low == high:
            raise UserError(f"method 'smpo' weighs pairs by their scores, and all scores of {source.name} are {low:g}")
        self.scale = self.scale or high - low
        middle = statistics.median(margins)
        if math.tanh(middle / (2 * self.scale)) > SATURATED:
            raise UserError(
                f"method.scale {self.scale:g} gives most pairs of {source.name} the largest weight, gamma: the "
                f"median margin of their scores is {middle:.3g}, and they span {high - low:.3g}; leave scale out to "
                "take that span, or choose diffusion_dpo, which weighs all pairs alike"
            )

    def describe(self) -> str:
        """Return the conventions: beta, the weights, and the noising of images."""
        c = self.config
        how = "shared Gaussian noise"
        if c.noising == "inversion":
            how = f"inversion by the policy in {c.inversion_steps} steps, renoise {c.renoise}, fidelity {c.fidelity}"
        span = "twice the span of the scores" if self.scale is None else f"{2 * self.scale:g}"
        weight = f"weight {c.gamma:g} tanh(margin / {span})"
        return f"{self.name}: beta={c.beta:g}, mean-reduced, half factor on; {weight}; {how}"

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; logit and accuracy are those of the weighted preference."""
        c = self.config
        assert batch.margins is not None and self.scale is not None, "check_data has seen a margin for every pair"
        weight = smpo_weight(batch.margins, gamma=c.gamma, scale=self.scale)
        inverted = c.noising == "inversion"
        noised = invert_pairs(run, batch, c, renoise=c.renoise) if inverted else noise_pairs(run, batch, c)
        policy, reference = noised.pair_errors(run.predict), noised.pair_errors(run.reference.predict)
        loss = smpo(*policy, *reference, weight, beta=c.beta).mean()
        logit = weight * diffusion_dpo_logit(*policy, *reference, beta=c.beta)
        return LossOutput(loss, {**pair_metrics(policy, reference, logit), "weight": weight.abs().mean()})
