"""TDPO: prefer the caption that fits an image over one that does not, by the denoising error under each caption.

Source: Cheng Xian et al., "Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs"
(arXiv 2509.25771): Diffusion-DPO's objective, whose two sides share image, noise and timestep; the captions differ.

Conventions: as in `diffusion_dpo`, errors are MEANS over latent dimensions and the factor 1/2 is on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.diffusion_dpo import diffusion_dpo_logit


def tdpo_logit(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float,
    rejected_rise: float = math.inf,
) -> Float[Tensor, " batch"]:
    """Return DPO's z from the errors under the fitting (chosen) and the other caption (rejected).

    The error under the rejected caption could rise without limit and the loss fall with it. Beyond
    `reference_rejected + rejected_rise` it is constant and has no gradient. (The paper bounds the gradient of this
    side too, but we could not read its formula; this bound is ours.)
    """
    bounded = torch.minimum(policy_rejected, reference_rejected.detach() + rejected_rise)
    return diffusion_dpo_logit(policy_chosen, bounded, reference_chosen, reference_rejected, beta=beta)


def tdpo(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float,
    rejected_rise: float = math.inf,
) -> Float[Tensor, " batch"]:
    """Return -log sigmoid(z) of each image, z as in `tdpo_logit`: log 2 where policy = reference or captions agree.

    Raises:
        ValueError: beta or rejected_rise is not positive.
    """
    if not beta > 0 or not rejected_rise > 0:
        raise ValueError(f"beta={beta} and rejected_rise={rejected_rise} must be positive (math.inf: no bound)")
    errors = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return -F.logsigmoid(tdpo_logit(*errors, beta=beta, rejected_rise=rejected_rise))
