"""CaPO: regress the difference of two implicit rewards onto that of two calibrated rewards.

Source: Lee et al., "Calibrated Multi-Preference Optimization for Aligning Diffusion Models" (arXiv 2502.02588); the
authors published no code.

Conventions: as in `diffusion_dpo`, errors are MEANS over latent dimensions and the factor 1/2 is on: beta times the
difference of implicit rewards is DPO's z. A calibrated reward is a win rate, so its differences lie within -1..1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.diffusion_dpo import diffusion_dpo_logit
from mmalign.losses.pair_loss import check_beta


def noise_level_weight(
    alpha: Float[Tensor, " batch"], sigma: Float[Tensor, " batch"], *, bias: float
) -> Float[Tensor, " batch"]:
    """Return sigmoid(bias - log(alpha^2 / sigma^2)), in [0, 1], larger for noisier levels; 1/2 at log-SNR = bias."""
    return torch.sigmoid(bias - 2 * (alpha.log() - sigma.log()))


def capo_logit(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float,
    weight: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return weight * z with z of `diffusion_dpo_logit`; `weight` is the weight of the noise level, None: 1."""
    z = diffusion_dpo_logit(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return z if weight is None else weight * z


def capo(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    margin: Float[Tensor, " batch"],
    *,
    beta: float,
    weight: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return (margin - z)^2 of each pair, z as in `capo_logit`; 0 exactly where the implicit rewards fit.

    `margin` is the calibrated reward of chosen less that of rejected. With margin 1 and weight 1 this is IPO with half
    the beta, times beta squared.

    Raises:
        ValueError: beta is not positive.
    """
    check_beta(beta)
    errors = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return (margin - capo_logit(*errors, beta=beta, weight=weight)).square()
