"""CaPO: regression onto calibrated rewards (arXiv 2502.02588); the objective itself is `mmalign.losses.capo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmalign.core.errors import UserError
from mmalign.losses import capo, capo_logit, noise_level_weight
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch, TimestepRange
from mmalign.methods.noising import noise_pairs, pair_metrics
from mmalign.methods.run import Run

if TYPE_CHECKING:
    from mmalign.data.pairs import PairTable


class CaPOConfig(TimestepRange):
    """Configuration of `capo`; beta as in `diffusion_dpo`: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference (errors are means over latent dimensions)"""
    level_bias: float | None = Field(None, allow_inf_nan=False)
    """weights each noise level by sigmoid(level_bias - log-SNR), larger for noisier ones; null: all weights are 1"""


class CaPO(Method[CaPOConfig]):
    """Make the difference of two implicit rewards equal that of two win rates, and no larger."""

    name: ClassVar[str] = "capo"
    Config = CaPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True)
    images_per_sample = 2

    def check_data(self, source: PairTable) -> None:
        """Refuse pairs without scores, and scores that are not win rates."""
        source.require_margins(self.name)
        low, high = source.score_range
        if not 0 <= low <= 0.5 <= high <= 1:
            raise UserError(
                "method 'capo' needs calibrated scores, which are win rates around 0.5, and those of "
                f"{source.name} lie in {low:.3g} to {high:.3g}; make pairs by `mmalign pairs label --mode calibrated`"
            )

    def describe(self) -> str:
        """Return the conventions: the scale of beta and the weights of the noise levels."""
        c = self.config
        weight = "1" if c.level_bias is None else f"sigmoid({c.level_bias:g} - log-SNR)"
        return f"capo: beta={c.beta:g}, mean-reduced, half factor on, weight of each noise level {weight}"

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the errors of both models on both sides."""
        c = self.config
        assert batch.margins is not None, "check_data has seen a margin for every pair"
        noised = noise_pairs(run, batch, c)
        weight = None
        if c.level_bias is not None:
            t = noised.t[: len(batch)]
            alpha, sigma = run.process.alpha(t), run.process.sigma(t)
            weight = noise_level_weight(alpha, sigma, bias=c.level_bias)
        policy, reference = noised.pair_errors(run.predict), noised.pair_errors(run.reference.predict)
        loss = capo(*policy, *reference, batch.margins, beta=c.beta, weight=weight).mean()
        logit = capo_logit(*policy, *reference, beta=c.beta, weight=weight)
        return LossOutput(loss, {**pair_metrics(policy, reference, logit), "margin": batch.margins.mean()})
