"""Diffusion-DPO on pairs of images (arXiv 2311.12908); the objective itself is `mmalign.losses.diffusion_dpo`.

Chosen and rejected share the noise, the timestep and the prompt (`mmalign.methods.noising`). Pairs of videos may have
labelled segments, each of which is then compared by itself (DenseDPO), and any pair may have a weight (VideoDPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from mmalign.losses import denoising_error, diffusion_dpo, diffusion_dpo_logit, segment_dpo
from mmalign.methods.auto_beta import AutoBeta
from mmalign.methods.base import LossOutput, Method, Needs, PairBatch, PairLossConfig, TimestepRange
from mmalign.methods.noising import Noised, noise_pairs, pair_metrics
from mmalign.methods.refreshed_reference import RefreshedReference, RefreshedReferenceConfig
from mmalign.methods.run import Run


class DiffusionDPOConfig(PairLossConfig, TimestepRange, RefreshedReferenceConfig):
    """Configuration of `diffusion_dpo`; conventions as printed in the log: errors are means, the half factor is on."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference (errors are means over latent dimensions)"""
    discount: float = Field(1.0, gt=0, le=1)
    """dense reward: a timestep's probability falls by this factor for each sampling step away from pure noise"""
    discount_steps: int = Field(50, ge=1)
    """number of sampling steps of the schedule, for `discount`"""
    sft_weight: float = Field(0.0, ge=0)
    """adds this many times the policy's error on the chosen image, against likelihood displacement"""
    anchor_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of policy's and reference's predictions, on chosen images"""
    auto_beta: float | None = Field(None, gt=0, lt=0.5)
    """beta follows the margins, so that the mean pair keeps this share of its gradient, such as 0.2; null: fixed"""
    auto_beta_decay: float = Field(0.99, ge=0, lt=1)
    """decay of the mean margin, an optimiser step"""
    auto_beta_bounds: tuple[float, float] = (65.0, 65536.0)
    """least and largest beta that follows"""

    @model_validator(mode="after")
    def _auto_beta_has_a_share_and_bounds(self) -> DiffusionDPOConfig:
        if self.auto_beta and self.loss_type != "sigmoid":
            raise ValueError(f"auto_beta is for loss_type: sigmoid, not {self.loss_type}; remove it")
        fields = type(self).model_fields
        unused = [key for key in ("auto_beta_decay", "auto_beta_bounds") if getattr(self, key) != fields[key].default]
        if not self.auto_beta and unused:
            raise ValueError(f"{unused[0]} is for auto_beta; set auto_beta, such as 0.2, or remove {unused[0]}")
        if not 0 < self.auto_beta_bounds[0] <= self.auto_beta_bounds[1]:
            raise ValueError(f"auto_beta_bounds {list(self.auto_beta_bounds)} must be positive, the least first")
        return self


class DiffusionDPO(Method[DiffusionDPOConfig]):
    """Prefer the chosen image over the rejected one, relative to the frozen starting point."""

    name: ClassVar[str] = "diffusion_dpo"
    Config = DiffusionDPOConfig
    needs: ClassVar[Needs] = Needs(source="pairs", reference=True)
    images_per_sample = 2
    weighs_pairs = True

    def __init__(self, config: DiffusionDPOConfig) -> None:
        """Start without margins."""
        super().__init__(config)
        c, (least, most) = config, config.auto_beta_bounds
        self.refreshed: RefreshedReference | None = None
        self.auto: AutoBeta | None = None
        if c.auto_beta is not None:
            self.auto = AutoBeta(target=c.auto_beta, decay=c.auto_beta_decay, least=least, most=most)

    @property
    def keeps_reference(self) -> bool:
        """A reference that follows the policy is kept by the method itself."""
        return self.config.reference_every is None

    def begin(self, run: Run) -> None:
        """Start the reference that follows the policy, if there is one."""
        c = self.config
        if c.reference_every:
            self.refreshed = RefreshedReference(
                run.generator.network, every=c.reference_every, decay=c.reference_decay
            )

    def describe(self) -> str:
        """Return the conventions: the scale of beta, on which the public codes disagree."""
        c = self.config
        extras: list[str] = [c.loss_type]
        if c.label_smoothing:
            extras.append(f"label_smoothing={c.label_smoothing:g}")
        if c.sft_weight:
            extras.append(f"sft_weight={c.sft_weight:g}")
        if c.anchor_weight:
            extras.append(f"anchor_weight={c.anchor_weight:g}")
        if c.auto_beta:
            extras.append(f"beta then set for sigmoid(-z)={c.auto_beta:g}")
        if c.reference_every:
            extras.append(f"reference refreshed every {c.reference_every} steps, decay {c.reference_decay:g}")
        if c.discount < 1:
            extras.append(f"timesteps discounted by {c.discount:g} per step of {c.discount_steps}")
        return f"diffusion_dpo: beta={c.beta:g}, mean-reduced, half factor on, {', '.join(extras)}"

    def loss(self, run: Run, batch: PairBatch) -> LossOutput:
        """Return the mean loss of the pairs; metrics hold the errors of both models on both sides."""
        c = self.config
        discount = c.discount ** (c.discount_steps / run.process.num_train_timesteps)
        noised = noise_pairs(run, batch, c, discount=discount)
        output = run.predict(noised.x_t, noised.t, noised.cond)
        other = self._reference(run, noised)
        policy, reference = noised.pair_errors_of(output), noised.pair_errors_of(other)
        beta = self.auto.beta(c.beta) if self.auto else c.beta
        options: dict[str, Any] = {"beta": beta, "loss_type": c.loss_type, "label_smoothing": c.label_smoothing}
        if batch.segments is None:
            losses = diffusion_dpo(*policy, *reference, **options)
        else:
            own, others = (noised.segment_errors_of(one, batch.segments) for one in (output, other))
            losses = segment_dpo(*own, *others, batch.segments.labels.to(own[0]), **options)
        loss = losses.mean() if batch.weights is None else (batch.weights * losses).mean()
        if c.sft_weight:
            loss = loss + c.sft_weight * policy[0].mean()
        if c.anchor_weight:
            half = len(output) // 2
            loss = loss + c.anchor_weight * denoising_error(output[:half], other[:half]).mean()
        logit = diffusion_dpo_logit(*policy, *reference, beta=beta)
        metrics: dict[str, Tensor | float] = {**pair_metrics(policy, reference, logit)}
        if self.auto:
            self.auto.see(2 / beta * logit)
            metrics["beta"] = beta
        if self.auto or c.anchor_weight:
            metrics["displacement"] = (policy[0].detach() - reference[0]).mean()
        return LossOutput(loss, metrics)

    def _reference(self, run: Run, noised: Noised) -> Tensor:
        if self.refreshed:
            return self.refreshed.predict(run, noised)
        return run.reference.predict(noised.x_t, noised.t, noised.cond)

    def after_update(self, run: Run) -> None:
        """Let beta follow the margins of the step, and the reference the policy."""
        if self.auto:
            self.auto.step()
        if self.refreshed:
            self.refreshed.after_update(run.step)

    def tensors(self) -> dict[str, Tensor]:
        """Return the reference that follows the policy, if there is one."""
        return self.refreshed.tensors() if self.refreshed else {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the reference that follows the policy."""
        if self.refreshed:
            self.refreshed.load(tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent margins, if beta follows them."""
        return self.auto.state_dict() if self.auto else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the recent margins."""
        if self.auto:
            self.auto.load_state_dict(state)
