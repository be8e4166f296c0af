"""DiffusionNFT: fit an implicit positive policy to good samples and an implicit negative one to bad samples.

Source: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (arXiv 2509.16117), in the
convention of the authors' code (NVlabs/DiffusionNFT, scripts/train_nft_sd3.py).

For a sample x0, noised to x_t with the velocity target u, and the predictions v of the policy and v_old of the policy
that drew x0:

* the positive policy is v+ = (1 - beta) v_old + beta v, the negative one v- = (1 + beta) v_old - beta v;
* an error is that of the implied clean sample. For rectified flow (u = noise - x0) and for v-prediction (u = alpha
  noise - sigma x0, alpha^2 + sigma^2 = 1) it is x0(v) - x0 = sigma (u - v), so that one function serves both;
* l+ and l- are MEANS over latent dimensions of the squared errors, each divided by its own mean absolute error;
* the sample's loss is (q l+ + (1 - q) l-) / beta, where q in [0, 1], the optimality, says how good the sample is.

Without the division by the absolute error this is, with D = v - v_old,

    sigma^2 { |v_old - u|^2 / beta + 2 (2q - 1) <D, v_old - u> + beta |D|^2 },

a step towards or away from the sample within a trust region of strength beta; its minimum is D = (2q - 1)(u - v_old)
/ beta. At D = 0 the value says nothing about the reward, and the gradient does not depend on beta.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MODES = ("all", "positive", "negative", "one", "binary")
LEAST_ERROR = 1e-5
"""Least mean absolute error that an error is divided by, as in the authors' code."""


def nft(
    policy: Float[Tensor, "batch *latent"],
    old: Float[Tensor, "batch *latent"],
    target: Float[Tensor, "batch *latent"],
    sigma: Float[Tensor, " batch"],
    optimality: Float[Tensor, " batch"],
    *,
    beta: float,
    normalise: bool = True,
) -> Float[Tensor, " batch"]:
    """Return the loss of each sample, from velocities [B, ...], noise levels sigma [B] and optimalities [B] in [0, 1].

    `normalise` divides a squared error by the mean absolute error, held constant. Gradients reach `policy` alone. In
    float32 or in the higher precision of the predictions.

    >>> v, u = torch.zeros(1, 4), torch.ones(1, 4)
    >>> nft(v, v, u, torch.tensor([0.5]), torch.tensor([1.0]), beta=1.0, normalise=False)  # (0.5 * 1)^2
    tensor([0.2500])

    Raises:
        ValueError: beta is not positive, the shapes do not fit, or an optimality lies outside [0, 1].
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    if (
        not policy.shape == old.shape == target.shape
        or sigma.shape != policy.shape[:1]
        or sigma.shape != optimality.shape
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (policy, old, target, sigma, optimality))
        raise ValueError(
            f"policy, old, target, sigma and optimality have shapes {shapes}; needed: three of [B, ...], [B] and [B]"
        )
    v = policy.to(torch.promote_types(policy.dtype, torch.float32))
    q = optimality.detach().to(v.dtype)
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(f"an optimality lies outside [0, 1]: {q.tolist()}")
    old, target = old.detach().to(v.dtype), target.detach().to(v.dtype)
    level = sigma.detach().to(v.dtype).reshape(-1, *[1] * (v.ndim - 1))
    step = beta * (v - old)
    positive = _error(level * (old + step - target), normalise)
    negative = _error(level * (old - step - target), normalise)
    return (q * positive + (1 - q) * negative) / beta


def optimality(advantages: Float[Tensor, " batch"], *, clip: float, mode: str = "all") -> Float[Tensor, " batch"]:
    """Return q = clip(A, +-clip) / (2 clip) + 1/2 in [0, 1]: 1/2 for a sample as good as its prompt's average.

    The paper has clip 1; the code has clip 5 and multiplies the loss by it. So a loss that is multiplied by `clip`
    has the same pull of the reward at any clip, and a trust region in proportion to it.

    mode
        ``all``: as it is; ``positive``, ``negative``: the others count as average; ``one``: 1 for those above
        average, 0 for the others; ``binary``: the sign.

    >>> optimality(torch.tensor([-9.0, 0.0, 2.5]), clip=5.0)
    tensor([0.0000, 0.5000, 0.7500])

    Raises:
        ValueError: clip is not positive, or mode is none of `MODES`.
    """
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    a = advantages.detach().clamp(-clip, clip)
    chosen = {
        "all": a,
        "positive": a.clamp(min=0),
        "negative": a.clamp(max=0),
        "one": (a > 0).to(a.dtype),
        "binary": a.sign(),
    }[mode]
    return (chosen / (2 * clip) + 0.5).clamp(0, 1)


def old_policy_decay(step: int, *, flat: int = 0, rate: float = 0.0, limit: float = 0.0) -> float:
    """Return d of old = d old + (1 - d) policy after `step` optimiser steps: 0 until `flat`, then rising to `limit`.

    The code's schedules are (flat, rate, limit) = (0, 0, 0), (0, 0.001, 0.5) and (75, 0.0075, 0.999).

    >>> old_policy_decay(100, rate=0.001, limit=0.5)
    0.1

    Raises:
        ValueError: a number is negative, or limit is 1 or more, with which the old policy would stand still.
    """
    if not (flat >= 0 and rate >= 0 and 0 <= limit < 1):
        raise ValueError(
            f"flat={flat}, rate={rate}, limit={limit}: needed are flat >= 0, rate >= 0 and 0 <= limit < 1"
        )
    return 0.0 if step < flat else min((step - flat) * rate, limit)


def _error(residual: Tensor, normalise: bool) -> Tensor:
    """Return the mean squared residual of each sample, divided by the mean absolute one; [B]."""
    flat = residual.flatten(1)
    error = flat.square().mean(1)
    if not normalise:
        return error
    return error / flat.detach().double().abs().mean(1).clamp(min=LEAST_ERROR).to(error.dtype)
