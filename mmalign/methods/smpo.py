"""SmPO: preferences smoothed by a reward, on inverted images (arXiv 2506.02698); objective: `mmalign.losses.smpo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmalign.losses import diffusion_dpo_logit, smpo, smpo_weight
from mmalign.losses.smpo import PICKSCORE_SPAN
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch
from mmalign.methods.noising import InversionConfig, invert_pairs, noise_pairs, pair_metrics
from mmalign.methods.run import Run
from pipelines.noise import NoiseProcess

if TYPE_CHECKING:
    from mmalign.data.pairs import PairTable


class SmPOConfig(InversionConfig):
    """Configuration of `smpo`; beta as in `diffusion_dpo`: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference, at weight 1"""
    gamma: float = Field(10.0, gt=0)
    """the largest weight of a pair"""
    scale: float = Field(PICKSCORE_SPAN, gt=0)
    """margin of the pairs' scores at which a weight is 0.46 gamma; the default is for PickScore as a cosine"""
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

    def check_data(self, source: PairTable) -> None:
        """Refuse pairs without scores."""
        source.require_margins(self.name)

    def describe(self) -> str:
        """Return the conventions: beta, the weights, and the noising of images."""
        c = self.config
        how = "shared Gaussian noise"
        if c.noising == "inversion":
            how = f"inversion by the policy in {c.inversion_steps} steps, renoise {c.renoise}, fidelity {c.fidelity}"
        return (
            f"{self.name}: beta={c.beta:g}, mean-reduced, half factor on; weight {c.gamma:g} tanh(margin / "
            f"{2 * c.scale:g}); {how}"
        )

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; logit and accuracy are those of the weighted preference."""
        c = self.config
        assert batch.margins is not None, "check_data has seen a margin for every pair"
        weight = smpo_weight(batch.margins, gamma=c.gamma, scale=c.scale)
        inverted = c.noising == "inversion"
        noised = invert_pairs(run, batch, c, renoise=c.renoise) if inverted else noise_pairs(run, batch, c)
        policy, reference = noised.pair_errors(run.predict), noised.pair_errors(run.reference.predict)
        loss = smpo(*policy, *reference, weight, beta=c.beta).mean()
        logit = weight * diffusion_dpo_logit(*policy, *reference, beta=c.beta)
        return LossOutput(loss, {**pair_metrics(policy, reference, logit), "weight": weight.abs().mean()})
