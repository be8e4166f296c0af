"""Diffusion-KTO: learn from single images that are good or bad, by the utility of denoising them.

Source: Li et al., "Aligning Diffusion Models by Optimizing Human Utility" (arXiv 2404.04465), in the convention of the
authors' code (jacklishufan/diffusion-kto, train_kto_sd_v1.5.py).

Conventions: errors are MEANS over latent dimensions, without the factor one half of Diffusion-DPO; the timestep count
is folded into beta; the reference point is the mean gain of the batch, not below 0, and has no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Utility = Literal["kahneman-tversky", "loss-averse", "risk-seeking"]


def kto_reference_point(gain: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the mean gain, without a gradient; clamped at 0 it is KTO's estimate of the KL divergence."""
    return gain.detach().mean()


def diffusion_kto(
    gain: Float[Tensor, " batch"],
    desirable: Bool[Tensor, " batch"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float,
    utility: Utility = "kahneman-tversky",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Return weight * (1 - U(v)) of each image, v = +-beta * (gain - max(reference_point, 0)), + for desirable ones.

    `gain` is the reference's error less the policy's. U is

    * "kahneman-tversky": sigmoid(v), concave in gains and convex in losses; the loss is 1/2 where policy = reference;
    * "loss-averse": log sigmoid(v), concave throughout; 1 + log 2 there;
    * "risk-seeking": -log sigmoid(-v), convex throughout; 1 - log 2 there (the code's `risk_seeking_3`).

    Raises:
        ValueError: beta or a weight is not positive, or the utility is not known.
    """
    if not (beta > 0 and desirable_weight > 0 and undesirable_weight > 0):
        raise ValueError(f"beta={beta} and the weights {desirable_weight}, {undesirable_weight} must be positive")
    centred = gain - reference_point.detach().clamp_min(0)
    v = beta * torch.where(desirable, centred, -centred)
    weight = torch.where(desirable, torch.full_like(v, desirable_weight), torch.full_like(v, undesirable_weight))
    return weight * (1 - _utility(v, utility))


def _utility(v: Tensor, utility: str) -> Tensor:
    if utility == "kahneman-tversky":
        return torch.sigmoid(v)
    if utility == "loss-averse":
        return F.logsigmoid(v)
    if utility == "risk-seeking":
        return -F.logsigmoid(-v)
    raise ValueError(f"utility={utility!r} is not known; allowed: 'kahneman-tversky', 'loss-averse', 'risk-seeking'")
