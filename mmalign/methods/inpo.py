"""DDIM-InPO: Diffusion-DPO on inverted images (arXiv 2503.18454); the objective is `mmalign.losses.diffusion_dpo`.

Each image reaches the noise level by DDIM inversion under the current policy, instead of random noise that both
sides share. The training target is the noise of its own trajectory.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mmalign.losses import diffusion_dpo, diffusion_dpo_logit
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch
from mmalign.methods.noising import InversionConfig, invert_pairs, pair_metrics
from mmalign.methods.run import Run
from pipelines.noise import NoiseProcess

CODE_ETA = 0.1


class InPOConfig(InversionConfig):
    """Configuration of `inpo`; beta as in `diffusion_dpo`: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference (errors are means over latent dimensions)"""
    inversion_eta: float | None = Field(None, ge=0, le=1)
    """noise added to each step of the inversion, in units of the sampler's; null: 0, with fidelity code 0.1"""

    @property
    def eta(self) -> float:
        """The noise of each inversion step, with the default resolved."""
        if self.inversion_eta is None:
            return CODE_ETA if self.fidelity == "code" else 0.0
        return self.inversion_eta


class InPO(Method[InPOConfig]):
    """Prefer the chosen image over the rejected one, each on its own inverted trajectory."""

    name: ClassVar[str] = "inpo"
    Config = InPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True)
    images_per_sample = 2

    def check(self, process: NoiseProcess) -> None:
        """Refuse timesteps or an inversion that the schedule does not support."""
        super().check(process)
        process.check_steps(self.config.inversion_steps)

    def describe(self) -> str:
        """Return the conventions: the scale of beta and the inversion."""
        c = self.config
        return (
            f"inpo: beta={c.beta:g}, mean-reduced, half factor on; inversion by the policy in {c.inversion_steps} "
            f"steps, eta {c.eta:g}, fidelity {c.fidelity}"
        )

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the errors of both models on both sides."""
        c = self.config
        noised = invert_pairs(run, batch, c, eta=c.eta)
        policy, reference = noised.pair_errors(run.predict), noised.pair_errors(run.reference.predict)
        loss = diffusion_dpo(*policy, *reference, beta=c.beta).mean()
        logit = diffusion_dpo_logit(*policy, *reference, beta=c.beta)
        return LossOutput(loss, pair_metrics(policy, reference, logit))
