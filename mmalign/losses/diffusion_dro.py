"""Diffusion-DRO: rank expert images above the policy's own, by the gain in denoising error over the reference.

Source: Wu et al., "Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback" (arXiv
2510.18353), in the convention of the authors' code (basiclab/DiffusionDRO): errors are means over latent dimensions.
The paper writes max(m', -L_L + L_R), the same up to a constant with m' = -margin.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def diffusion_dro(
    policy_expert: Float[Tensor, " batch"],
    reference_expert: Float[Tensor, " batch"],
    policy_own: Float[Tensor, " batch"],
    reference_own: Float[Tensor, " batch"],
    *,
    margin: float = 1e-3,
) -> Float[Tensor, " batch"]:
    """Return max(0, (policy - reference error of expert images) - (policy - reference error of own) + margin).

    The expert's error is against the Gaussian noise that was added; that of the policy's own image is against what
    the policy of the round's beginning predicted on its own trajectory, so `policy_own` is 0, and so is its gradient,
    until the policy has moved. The loss is `margin` where all three networks are equal. There is no beta.

    Raises:
        ValueError: the margin is negative.
    """
    if margin < 0:
        raise ValueError(f"margin={margin} must be at least 0")
    return torch.relu((policy_expert - reference_expert) - (policy_own - reference_own) + margin)
