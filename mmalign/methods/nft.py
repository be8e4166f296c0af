"""DiffusionNFT: learn from good and bad samples by the forward process (arXiv 2509.16117); `mmalign.losses.nft`.

The policy moves from the old policy towards the samples that scored better than their prompt's average, and away from
the others, by the velocity at noise levels drawn afresh. Sampling is deterministic and without guidance.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mmalign.losses import nft, optimality
from mmalign.methods.base import LossOutput
from mmalign.methods.forward_process import ForwardProcessConfig, ForwardProcessMethod, NoisedSamples
from mmalign.methods.run import Run


class NFTConfig(ForwardProcessConfig):
    """Configuration of `nft`; errors are means over latent dimensions, in the clean latents."""

    beta: float = Field(1.0, gt=0, allow_inf_nan=False)
    """strength of the old policy's hold: how far the implicit policies are from it, and an inverse step size"""
    advantage_clip: float = Field(5.0, gt=0, allow_inf_nan=False)
    """advantages are clipped to +- this value, which are optimalities 0 and 1, and the loss is multiplied by it"""
    advantage_mode: Literal["all", "positive", "negative", "one", "binary"] = "all"
    """all advantages; positive or negative ones alone; one: 1 above average, 0 below; binary: their signs"""
    normalise: bool = True
    """divide each squared error by its mean absolute error, held constant"""


class NFT(ForwardProcessMethod[NFTConfig]):
    """Move the velocity towards samples that are better than their prompt's average, away from worse ones."""

    name: ClassVar[str] = "nft"
    Config = NFTConfig

    def describe(self) -> str:
        """Return the conventions: beta, the clip of the advantages, and the sampling."""
        c = self.config
        return (
            f"nft: beta={c.beta:g}, advantages in units of the spread of the {c.advantage_std}, clipped at "
            f"{c.advantage_clip:g}, {c.images_per_prompt} images per prompt in {c.sampling_steps} steps at guidance "
            f"{c.guidance:g}, {c.updates_per_round} updates per round on {c.levels} levels, old policy {c.old_decay}"
        )

    def loss(self, run: Run, batch: NoisedSamples) -> LossOutput:
        """Return the mean over the samples."""
        c = self.config
        q = optimality(batch.advantages, clip=c.advantage_clip, mode=c.advantage_mode)
        losses = nft(batch.policy, batch.old, batch.noised.target, batch.sigma, q, beta=c.beta, normalise=c.normalise)
        return LossOutput(c.advantage_clip * losses.mean())
