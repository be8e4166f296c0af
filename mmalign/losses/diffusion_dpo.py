"""Diffusion-DPO: lower the denoising error of the chosen image relative to the reference, raise the rejected one's.

Source: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), eq. 14,
in the convention of the authors' code (SalesforceAIResearch/DiffusionDPO, train.py).

Conventions, because the public codes disagree:

* errors are MEANS over latent dimensions; with sums instead, divide beta by the number of dimensions;
* the timestep count T and the weight of the noise level are folded into beta;
* the factor 1/2 is on: logit = beta/2 * margin (diffusers' SD1.5 script leaves it out: its beta=2500 is 5000 here).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.pair_loss import LossType, pair_loss


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

    z is as in `diffusion_dpo_logit`; `pair_loss` describes `loss_type` and `label_smoothing`. The margin of "ipo"
    keeps the factor 1/2.

    Raises:
        ValueError: beta is not positive, the smoothing is outside [0, 0.5), or `loss_type` is not known.
    """
    z = diffusion_dpo_logit(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return pair_loss(z, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)


def segment_dpo(
    policy_chosen: Float[Tensor, "batch segments"],
    policy_rejected: Float[Tensor, "batch segments"],
    reference_chosen: Float[Tensor, "batch segments"],
    reference_rejected: Float[Tensor, "batch segments"],
    labels: Float[Tensor, "batch segments"],
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return DenseDPO's loss of each pair of videos, the mean of `diffusion_dpo` over its segments.

    Source: Wu et al., "DenseDPO: Fine-Grained Temporal Preference Optimization for Video Diffusion Models"
    (arXiv 2506.03517); the authors published no code, and the mean over segments and the factor 1/2 are ours.

    Errors are means over the latents of a segment. `labels` are 1 where the chosen video is better in the segment, -1
    where the rejected one is; segments of label 0 do not count, and a pair that has no others costs 0.

    Raises:
        ValueError: see `diffusion_dpo`.
    """
    errors = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    z = labels.flatten() * diffusion_dpo_logit(*(error.flatten() for error in errors), beta=beta)
    losses = pair_loss(z, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing).view_as(labels)
    counted = labels != 0
    return torch.where(counted, losses, 0.0).sum(1) / counted.sum(1).clamp(min=1)


def beta_of_margin(margin: float, *, target: float) -> float:
    """Return the beta at which a pair of that margin has sigmoid(-z) = `target`, the weight of its gradient.

    `margin` > 0 is the mean |margin| of recent pairs in units of the errors: z = beta/2 * margin. So beta =
    2 log(1 / target - 1) / margin, whose numerator is 2.7726 at 0.2 (Flow-DPO of SimpleTuner, there on sums).

    >>> round(beta_of_margin(0.001, target=0.2), 1)
    2772.6

    Raises:
        ValueError: the margin is not positive, or the target is not in (0, 0.5).
    """
    if not margin > 0:
        raise ValueError(f"margin={margin} must be positive")
    if not 0 < target < 0.5:
        raise ValueError(f"target={target} must lie in (0, 0.5)")
    return 2 * math.log(1 / target - 1) / margin
