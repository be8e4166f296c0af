"""Policy gradients on the steps of a recorded trajectory: DDPO's clip, DPOK's clamp and its KL, Flow-DPPO's mask.

Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), eq. 7; Black et al., "Training
Diffusion Models with Reinforcement Learning" (DDPO, arXiv 2305.13301); Fan et al., "DPOK" (arXiv 2305.16381).

Convention of the authors' codes: log-probabilities are MEANS over the D latent dimensions, so rho is the true ratio
to the power 1/D. Their clip of 1e-4 lets the true ratio of a step move by exp(+-1e-4 * D): a factor 5 at D = 16384.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_policy_gradient(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*#shape"],
    *,
    clip: float,
) -> Float[Tensor, "*shape"]:
    """Return DDPO's loss of each step: max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)), rho = exp(log_prob - old).

    `advantage` A (see `mmalign.losses.advantages`) has the shape of `log_prob` or broadcasts to it. Where the policy
    is the one that sampled, rho = 1 and the gradient is -A grad log_prob, REINFORCE; a step that has moved by more
    than `clip` in the direction that A favours gets none. `math.inf` switches the clipping off. `old_log_prob` and
    `advantage` get no gradient. In float32 or in the higher precision of the log-probabilities.

    Raises:
        ValueError: clip is not positive, or the shapes do not fit.
    """
    ratio, advantage = _ratio_and_advantage(log_prob, old_log_prob, advantage, clip)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def clamped_policy_gradient(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*#shape"],
    *,
    clip: float,
) -> Float[Tensor, "*shape"]:
    """Return DPOK's loss of each step: -A clamp(rho, 1 - clip, 1 + clip), without PPO's maximum.

    Arguments and errors as in `clipped_policy_gradient`, with one difference: a step that has moved by
    more than `clip` gets no gradient in either direction, not even for coming back.
    """
    ratio, advantage = _ratio_and_advantage(log_prob, old_log_prob, advantage, clip)
    return -advantage * ratio.clamp(1 - clip, 1 + clip)


def masked_policy_gradient(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*#shape"],
    divergence: Float[Tensor, "*shape"],
    *,
    limit: float,
) -> Float[Tensor, "*shape"]:
    """Return Flow-DPPO's loss of each step: -A rho, without a gradient where the step has left its trust region.

    That is where its `divergence` from the old policy (`gaussian_kl`, nats per dimension) is at least `limit` and
    rho has moved in the direction that A favours; the value there is 0. Source: the published codes verl-omni and
    UniRL. Other arguments and errors as in `clipped_policy_gradient`.
    """
    ratio, advantage = _ratio_and_advantage(log_prob, old_log_prob, advantage, limit)
    onwards = (ratio.detach() - 1) * advantage > 0
    return -advantage * ratio * ~(onwards & (divergence.detach() >= limit))


def gaussian_kl(
    mean: Float[Tensor, "batch *latent"],
    reference_mean: Float[Tensor, "batch *latent"],
    std: Float[Tensor, " ..."],
) -> Float[Tensor, " batch"]:
    """Return KL(N(mean, std^2) || N(reference_mean, std^2)) of one sampling step, the MEAN over latent dimensions.

    (mean - reference_mean)^2 / (2 std^2) in nats per dimension; the true KL is D times this. `std` is ``[batch]`` or
    broadcasts. Where ``std = 0`` the step is deterministic, its true KL 0 or infinite; the result is 0 there, like its
    log-probability in a recorded trajectory. In float32 or in the higher precision of the means.

    Raises:
        ValueError: the shapes of the two means differ (broadcasting would hide a mistake).
    """
    if mean.shape != reference_mean.shape:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)}, reference_mean {tuple(reference_mean.shape)}; they must be equal"
        )
    precise = torch.promote_types(torch.promote_types(mean.dtype, reference_mean.dtype), torch.float32)
    if std.ndim == 1:
        std = std.reshape(-1, *[1] * (mean.ndim - 1))
    random = std > 0
    safe = torch.where(random, std, torch.ones_like(std)).to(precise)
    divergence = (mean.to(precise) - reference_mean.to(precise)).square() / (2.0 * safe.square())
    return torch.where(random, divergence, torch.zeros_like(divergence)).flatten(start_dim=1).mean(dim=1)


def _ratio_and_advantage(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Check the arguments of a policy gradient; return rho and the advantage in the precision of rho."""
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive (math.inf: no clipping)")
    try:
        fits = log_prob.shape == old.shape == torch.broadcast_shapes(old.shape, advantage.shape)
    except RuntimeError:
        fits = False
    if not fits:
        shapes = ", ".join(str(tuple(x.shape)) for x in (log_prob, old, advantage))
        raise ValueError(
            f"log_prob, old_log_prob and advantage have shapes {shapes}; needed: the first two equal, the third "
            "equal to them or broadcast to them"
        )
    precise = torch.promote_types(torch.promote_types(log_prob.dtype, old.dtype), torch.float32)
    ratio = (log_prob.to(precise) - old.detach().to(precise)).exp()
    return ratio, advantage.detach().to(precise)
