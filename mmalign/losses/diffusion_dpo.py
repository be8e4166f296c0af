"""Diffusion-DPO: prefer the chosen image by denoising it better than the reference does, the rejected one worse.

Source: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), eq. 14,
in the convention of the authors' code (SalesforceAIResearch/DiffusionDPO, train.py).

Conventions, because the public codes disagree:

* errors are MEANS over latent dimensions; with sums instead, divide beta by the number of dimensions;
* the timestep count T and the weight of the noise level are folded into beta;
* the factor 1/2 is on: logit = beta/2 * margin (diffusers' SD1.5 script leaves it out: its beta=2500 is 5000 here).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LossType = Literal["sigmoid", "robust", "ipo", "hinge"]


def diffusion_dpo_logit(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    """Return z = beta/2 * ((reference - policy error of chosen) - (reference - policy error of rejected)).

    z is the difference of the two implicit rewards in nats: positive where the policy, compared with the reference,
    favours the chosen image; exactly 0 where policy and reference are equal.
    """
    return 0.5 * beta * ((reference_chosen - policy_chosen) - (reference_rejected - policy_rejected))


def diffusion_dpo(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the loss of each pair from the denoising errors (see `denoising_error`) of its two images.

    With z as in `diffusion_dpo_logit` and f the loss of a pair whose label is right:

    * "sigmoid": f(z) = -log sigmoid(z); log 2 where policy = reference;
    * "hinge":   f(z) = max(0, 1 - z), the SLiC form (arXiv 2305.10425);
    * "ipo":     f(z) = (z/beta - 1/(2 beta))**2, arXiv 2310.12036 eq. 17 with z/beta for the margin (which keeps the
      half), so the optimum is at z = 1/2 for any beta; values scale with 1/beta**2, compare them at equal beta only;
    * "robust":  f(z) = -log sigmoid(z) with the correction for wrong labels below.

    `label_smoothing` e in [0, 0.5) is the probability that a label is wrong: (1 - e) f(z) + e f(-z), which for
    "sigmoid" is conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023). "robust" is rDPO
    (arXiv 2403.00409), ((1 - e) f(z) - e f(-z)) / (1 - 2 e): its mean over labels that are wrong with
    probability e is f(z) of the right label exactly, for every policy. It can be negative and has no lower bound.

    Raises:
        ValueError: beta is not positive, the smoothing is outside [0, 0.5), or `loss_type` is not known.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta} must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 0.5): from 0.5 on, labels say nothing")
    z = diffusion_dpo_logit(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    right = _pair_loss(z, beta, loss_type)
    if label_smoothing == 0:
        return right
    wrong = _pair_loss(-z, beta, loss_type)
    if loss_type == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _pair_loss(z: Tensor, beta: float, loss_type: str) -> Tensor:
    if loss_type in ("sigmoid", "robust"):
        return -F.logsigmoid(z)
    if loss_type == "hinge":
        return torch.relu(1 - z)
    if loss_type == "ipo":
        return (z / beta - 1 / (2 * beta)).square()
    raise ValueError(f"loss_type={loss_type!r} is not known; allowed: 'sigmoid', 'robust', 'ipo', 'hinge'")
