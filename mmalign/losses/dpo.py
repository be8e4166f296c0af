"""DPO on completions: raise the log-probability of the chosen one against the reference, lower the rejected one's.

Source: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), eq. 7.

Conventions: the arguments are log-probabilities of whole completions, `completion_sum` of their tokens in the paper;
`completion_mean` instead gives the length-normalised form (of SimPO, arXiv 2405.14734, with a reference), for which a
beta ten times as large or more is usual. There is no factor 1/2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.pair_loss import LossType, check_beta, pair_loss


def dpo_logit(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float | Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Return z = beta * ((policy - reference of chosen) - (policy - reference of rejected)).

    z is the difference of the two implicit rewards in nats; exactly 0 where policy and reference are equal. `beta` is
    one number or one a sample.
    """
    return beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))


def dpo(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float | Float[Tensor, " batch"],
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the loss of each pair; `pair_loss` describes `loss_type` and `label_smoothing`.

    TRL's "ipo" is this one on `completion_mean`; the paper's (arXiv 2310.12036) is on sums.

    Raises:
        ValueError: beta is not positive, the smoothing is outside [0, 0.5), or `loss_type` is not known.
    """
    z = dpo_logit(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return pair_loss(z, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)


def chosen_anchor(
    policy_chosen: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    *,
    beta: float | Float[Tensor, " batch"],
    margin: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return -log sigmoid(beta * (policy - reference of chosen) - margin): the chosen one's log-prob must not fall.

    Source: mDPO (arXiv 2406.11839). Its gradient always raises the log-probability of the chosen completion.

    Raises:
        ValueError: beta is not positive.
    """
    check_beta(beta)
    return -F.logsigmoid(beta * (policy_chosen - reference_chosen) - margin)


def beta_of_gap(
    gap: Float[Tensor, " batch"], *, beta: float, rise: float = 0.5, slope: float = 0.5, floor: float = 1e-3
) -> Float[Tensor, " batch"]:
    """Return MM-DPO's beta of each pair, beta * (1 + rise * (1 - exp(-slope * gap))): larger for a clearer preference.

    Source: MM-RLHF (arXiv 2502.10391), in the paper's form; `gap` is the reward of the chosen minus that of the
    rejected completion. Ours: it is bounded below by `floor`, because the formula becomes negative, which reverses the
    preference, for gaps under -2 log 3 (at the defaults).

    Raises:
        ValueError: beta, slope or floor is not positive, or rise is negative.
    """
    if not (beta > 0 and slope > 0 and floor > 0 and rise >= 0):
        raise ValueError(f"beta={beta}, slope={slope} and floor={floor} must be positive, rise={rise} not negative")
    # Where the exponential could overflow, the result is below the floor anyway.
    return (beta * (1 - rise * torch.expm1((-slope * gap).clamp(max=80.0)))).clamp(min=floor)
