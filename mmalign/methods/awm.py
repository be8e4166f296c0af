"""AWM: a policy gradient on the denoising error as log-likelihood (arXiv 2509.25050); `mmalign.losses.awm`.

The policy itself draws the samples; the copy of its weights that follows it holds it in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmalign.core.ema import Shadow
from mmalign.data.batches import PromptBatch
from mmalign.losses import awm_log_prob, clipped_policy_gradient, denoising_error
from mmalign.losses.awm import Weighting
from mmalign.methods.base import LossOutput
from mmalign.methods.forward_process import (
    ForwardProcessConfig,
    ForwardProcessMethod,
    LevelGrid,
    NoisedSamples,
    OldDecay,
    SamplerSteps,
    ScoredSamples,
    predict_by,
)
from mmalign.methods.run import Run


class AWMConfig(ForwardProcessConfig):
    """Configuration of `awm`; errors are means over latent dimensions, of the velocity."""

    sampling_steps: int = Field(14, ge=1)
    """steps of the deterministic sampler"""
    levels: int = Field(6, ge=1)
    """noise levels at which an update trains on an image"""
    level_grid: LevelGrid = "sampler_parts"
    """which levels: one of the sampler's in each of so many equal parts of its steps, or as in `nft`"""
    sampler_steps: SamplerSteps = (1, 12)
    """steps of the sampler, [first, end), whose levels are trained on; 0 is the noisiest; null: all"""
    old_decay: OldDecay = (0, 0.001, 0.3)
    """how the old policy, the anchor, follows; as in `nft`"""
    reference_weight: float = Field(1e-3, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of the predictions of policy and reference"""
    weighting: Weighting = "ghuber"
    """log-likelihood of an error l at noise level t: uniform -l, t -t l, t2 -t^2 l, huber and ghuber roots of l"""
    power: float = Field(0.25, gt=0, le=1)
    """the root of ghuber; 1: t"""
    clip: float = Field(1.0, gt=0)
    """PPO's clip of the ratio to the policy that drew the samples; acts from the second update of a round on"""
    advantage_clip: float = Field(5.0, gt=0, allow_inf_nan=False)
    """advantages are clipped to +- this value and divided by it"""
    anchor_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of the predictions of policy and old policy"""


class AWM(ForwardProcessMethod[AWMConfig]):
    """Denoise samples in proportion to their advantage, held by a trailing copy of the policy."""

    name: ClassVar[str] = "awm"
    Config = AWMConfig
    start: Shadow | None = None
    """The policy that drew the samples, where a round has several updates."""

    def describe(self) -> str:
        """Return the conventions: the weighting, what holds the policy, and the sampling."""
        c = self.config
        power = f" {c.power:g}" if c.weighting == "ghuber" else ""
        return (
            f"awm: weighting {c.weighting}{power} of mean errors, advantages clipped at {c.advantage_clip:g} and "
            f"scaled to 1, anchor {c.anchor_weight:g}, reference {c.reference_weight:g}, "
            f"{c.images_per_prompt} images per prompt in {c.sampling_steps} steps at guidance {c.guidance:g}, "
            f"{c.levels} levels"
        )

    def sampler(self, run: Run) -> AbstractContextManager[None]:
        """Let the policy sample."""
        return nullcontext()

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[ScoredSamples]:
        """Remember the policy that samples, if the round has several updates."""
        self.start = Shadow(self.old.parameters) if self.updates_per_round > 1 else None
        return super().collect(run, batches)

    def loss(self, run: Run, batch: NoisedSamples) -> LossOutput:
        """Return the clipped objective and the anchor, means over the samples."""
        c = self.config
        now = self._log_prob(batch.policy, batch)
        old = now.detach()
        if self.start is not None and run.step > batch.drawn_at:
            old = self._log_prob(predict_by(run, self.start, batch.noised), batch)
        advantages = batch.advantages.clamp(-c.advantage_clip, c.advantage_clip) / c.advantage_clip
        loss = clipped_policy_gradient(now, old, advantages, clip=c.clip).mean()
        anchor = denoising_error(batch.policy, batch.old).mean()
        clipped = ((now.detach() - old).exp() - 1).abs() > c.clip
        return LossOutput(loss + c.anchor_weight * anchor, {"clipped": clipped.float().mean()})

    def _log_prob(self, velocity: Float[Tensor, "batch *latent"], batch: NoisedSamples) -> Float[Tensor, " batch"]:
        c = self.config
        return awm_log_prob(velocity, batch.noised.target, batch.sigma, weighting=c.weighting, power=c.power)
