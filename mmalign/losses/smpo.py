"""SmPO: Diffusion-DPO with the weight and the direction of each pair given by its reward margin.

Source: Lu et al., "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied
Human Preferences" (arXiv 2506.02698), in the convention of the authors' code (JaydenLyh/SmPO, train.py).

The label of a pair is replaced by p(chosen)^alpha p(rejected)^(gamma - alpha), which turns DPO's logit z into
(2 alpha - gamma) z. With alpha = gamma * softmax of the two rewards, rescaled by `scale`, the factor is
gamma * tanh(margin / (2 scale)): 0 for equal rewards, at most gamma, negative where the reward contradicts the label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.diffusion_dpo import diffusion_dpo_logit

PICKSCORE_SPAN = 0.16658
"""Largest less smallest PickScore, as a cosine, in the authors' data: 0.28202 - 0.11544."""


def smpo_weight(
    margin: Float[Tensor, " batch"], *, gamma: float = 10.0, scale: float = PICKSCORE_SPAN
) -> Float[Tensor, " batch"]:
    """Return 2 alpha - gamma = gamma * tanh(margin / (2 scale)), odd in the margin, within -gamma..gamma.

    `margin` is the reward of chosen less that of rejected; `scale` is in its units.

    Raises:
        ValueError: gamma or scale is not positive.
    """
    if not gamma > 0 or not scale > 0:
        raise ValueError(f"gamma={gamma} and scale={scale} must be positive")
    return gamma * torch.tanh(margin / (2 * scale))


def smpo(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    weight: Float[Tensor, " batch"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    """Return -log sigmoid(weight * z) with z of `diffusion_dpo_logit` (means over dimensions, half factor on).

    Weight 1 is Diffusion-DPO; weight 0 costs log 2 and has no gradient.

    Raises:
        ValueError: beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    z = diffusion_dpo_logit(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return -F.logsigmoid(weight * z)
