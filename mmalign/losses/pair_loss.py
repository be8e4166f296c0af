"""The loss of a pair from its margin: the options of the DPO family, for images and for tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LossType = Literal["sigmoid", "robust", "ipo", "hinge"]


def pair_loss(
    z: Float[Tensor, " batch"],
    *,
    beta: float | Float[Tensor, " batch"],
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the loss of each pair from z, the difference of its two implicit rewards in nats (beta included).

    With f the loss of a pair whose label is right:

    * "sigmoid": f(z) = -log sigmoid(z); log 2 where policy = reference;
    * "hinge":   f(z) = max(0, 1 - z), the SLiC form (arXiv 2305.10425);
    * "ipo":     f(z) = (z/beta - 1/(2 beta))**2, arXiv 2310.12036 eq. 17 with z/beta for the margin, so the optimum is
      at z = 1/2 for any beta; values scale with 1/beta**2, compare them at equal beta only;
    * "robust":  f(z) = -log sigmoid(z) with the correction for wrong labels below.

    `label_smoothing` e in [0, 0.5) is the probability that a label is wrong: (1 - e) f(z) + e f(-z), which for
    "sigmoid" is conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023). "robust" is rDPO
    (arXiv 2403.00409), ((1 - e) f(z) - e f(-z)) / (1 - 2 e): its mean over labels that are wrong with
    probability e is f(z) of the right label exactly, for every policy. It can be negative and has no lower bound.

    Raises:
        ValueError: beta is not positive, the smoothing is outside [0, 0.5), or `loss_type` is not known.
    """
    check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 0.5): at 0.5 labels carry no information")
    right = _of_right_label(z, beta, loss_type)
    if label_smoothing == 0:
        return right
    wrong = _of_right_label(-z, beta, loss_type)
    if loss_type == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def check_beta(beta: float | Tensor) -> None:
    """Raise a ValueError unless every beta is positive: a negative one reverses the preference."""
    if isinstance(beta, Tensor) and not bool((beta > 0).all()):
        raise ValueError(f"beta={beta.tolist()} must be positive everywhere")
    if not isinstance(beta, Tensor) and not beta > 0:
        raise ValueError(f"beta={beta} must be positive")


def _of_right_label(z: Tensor, beta: float | Tensor, loss_type: str) -> Tensor:
    if loss_type in ("sigmoid", "robust"):
        return -F.logsigmoid(z)
    if loss_type == "hinge":
        return torch.relu(1 - z)
    if loss_type == "ipo":
        return (z / beta - 1 / (2 * beta)).square()
    raise ValueError(f"loss_type={loss_type!r} is not known; allowed: 'sigmoid', 'robust', 'ipo', 'hinge'")
