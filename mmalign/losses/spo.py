"""Step-by-step preference optimisation: at each sampling step, prefer the best of a few candidates over the worst.

Source: Liang et al., "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference
Optimization" (SPO, arXiv 2406.04314); the threshold that follows the step's noise and the softmax of the two scores
are those of Zhang et al., "Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference
Optimization" (LPO, arXiv 2502.01051; code Kwai-Kolors/LPO).

Convention of both codes: log-probabilities are MEANS over the D latent dimensions, so a ratio is the true one to the
power 1/D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def step_preference(
    score: Float[Tensor, "candidates batch"], threshold: float
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Return the best and the worst candidate of each chain, and whether their scores differ enough to be valid.

    With (p, q) the softmax of the two scores, a pair is valid where p - q > threshold, that is where the scores
    differ by more than log((1 + threshold) / (1 - threshold)).

    Raises:
        ValueError: the threshold is outside [0, 1), or one candidate alone makes no pair.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold} must lie in [0, 1)")
    if len(score) < 2:
        raise ValueError("one candidate makes no pair; a step needs at least two")
    best, worst = score.max(0), score.min(0)
    return best.indices, worst.indices, ((best.values - worst.values) / 2).tanh() > threshold


def dynamic_threshold(std: float, stds: tuple[float, float], thresholds: tuple[float, float]) -> float:
    """Return the threshold of a step, linear in its std: thresholds[0] at the least, thresholds[1] at the largest.

    `stds` are those two of the whole table of the sampler's levels, also where a part of them is learned from. A line
    that begins below 0 is 0 there, which every pair exceeds whose scores differ.
    """
    low, high = stds
    share = (std - low) / (high - low) if high > low else 0.0
    return max(0.0, thresholds[0] + share * (thresholds[1] - thresholds[0]))


def spo_logit(
    best: Float[Tensor, " batch"], worst: Float[Tensor, " batch"], *, beta: float, clip: float
) -> Float[Tensor, " batch"]:
    """Return z = beta (log r_best - log r_worst), r = clamp(exp(log-ratio to the reference), 1 - clip, 1 + clip).

    `best` and `worst` are the log-ratios of the two candidates. |z| <= beta log((1 + clip) / (1 - clip)); beyond the
    clamp there is no gradient in either direction.

    Raises:
        ValueError: beta is not positive, or the clip is outside (0, 1).
    """
    if not beta > 0 or not 0 < clip < 1:
        raise ValueError(f"beta={beta} must be positive and clip={clip} lie in (0, 1)")
    ratios = torch.stack([best, worst]).to(torch.promote_types(best.dtype, torch.float32)).exp()
    log_best, log_worst = ratios.clamp(1 - clip, 1 + clip).log().unbind()
    return beta * (log_best - log_worst)


def spo(
    best: Float[Tensor, " batch"],
    worst: Float[Tensor, " batch"],
    valid: Bool[Tensor, " batch"],
    *,
    beta: float,
    clip: float,
) -> Float[Tensor, " batch"]:
    """Return -log sigmoid(z) of each pair with z of `spo_logit`, and 0, without a gradient, where it is not valid.

    log 2 where policy and reference are equal.

    Raises:
        ValueError: as `spo_logit`.
    """
    loss = -F.logsigmoid(spo_logit(best, worst, beta=beta, clip=clip))
    return torch.where(valid, loss, torch.zeros_like(loss))
