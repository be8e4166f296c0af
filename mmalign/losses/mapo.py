"""MaPO: widen the margin between two likelihoods and raise that of the chosen image, without any reference.

Source: Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference"
(arXiv 2406.06424), in the convention of the authors' code (mapo-t2i/mapo, train.py).

Conventions: errors are MEANS over latent dimensions; the number of training timesteps T stands explicitly inside the
sigmoid; beta weighs the preference term against the denoising error (no KL anywhere).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_SERIES_BELOW = 0.1


def mapo_likelihood(error: Float[Tensor, " batch"], *, snr: float = 0.5) -> Float[Tensor, " batch"]:
    """Return f(error) = s e / (exp(s e) - 1), MaPO's stand-in for a likelihood: 1 at error 0, falling towards 0.

    Near 0 the quotient loses all digits (its derivative sooner than itself), so its series is used there; for large
    errors it is written with exp(-s e), which cannot overflow. `snr` is s > 0.

    Raises:
        ValueError: snr is not positive.
    """
    if not snr > 0:
        raise ValueError(f"snr={snr} must be positive")
    x = snr * error
    square = x.square()
    series = 1 - x / 2 + square / 12 * (1 - square / 60 * (1 - square / 42))
    near = x < _SERIES_BELOW
    # `where` differentiates both branches, so each must be finite where the other one is used.
    far = torch.where(near, _SERIES_BELOW, x)
    return torch.where(near, series, far * torch.exp(-far) / -torch.expm1(-far))


def mapo_logit(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    *,
    snr: float = 0.5,
    scale: float = 1000.0,
) -> Float[Tensor, " batch"]:
    """Return z = scale * (f(error of chosen) - f(error of rejected)); positive where chosen is denoised better."""
    return scale * (mapo_likelihood(policy_chosen, snr=snr) - mapo_likelihood(policy_rejected, snr=snr))


def mapo(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    snr: float = 0.5,
    scale: float = 1000.0,
) -> Float[Tensor, " batch"]:
    """Return error of chosen - beta * log sigmoid(z) for each pair, z as in `mapo_logit`.

    `scale` is the number of training timesteps T. Equal errors cost beta * log 2 besides the error itself.

    Raises:
        ValueError: beta, snr or scale is not positive.
    """
    if not beta > 0 or not scale > 0:
        raise ValueError(f"beta={beta} and scale={scale} must be positive")
    z = mapo_logit(policy_chosen, policy_rejected, snr=snr, scale=scale)
    return policy_chosen - beta * F.logsigmoid(z)
