"""PRDP: predict the difference of two rewards from the log-ratios of the trajectories of the two images.

Source: Deng et al., "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion
Models" (arXiv 2402.08714); the authors published no code.

Conventions, which fix the units of beta and clip:

* the log-ratio of a step is log p_policy(x' | x) - log p_reference(x' | x) of the recorded transition x -> x';
* SUMMED over the D latent dimensions, as in the paper, the loss is 0 for every pair exactly where the policy is
  p_reference * exp(reward / beta), the optimum of E[reward] - beta * KL(policy || reference);
* as MEANS over dimensions (what samplers record), beta and clip are per dimension: beta_mean = D * beta_sum and
  clip_mean = clip_sum / D give the same optimum and the same clipped steps; losses and gradients with respect to the
  policy's weights are those of the sums divided by D**2. On means one beta and one clip serve every resolution.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def prdp(
    log_ratio: Float[Tensor, "batch steps"],
    old_log_ratio: Float[Tensor, "batch steps"],
    reward: Float[Tensor, " batch"],
    *,
    beta: float,
    clip: float,
) -> Float[Tensor, " pairs"]:
    """Return the loss of each pair among the B images of ONE prompt, in the order of `itertools.combinations`.

    With R = sum over steps of the log-ratio, for the images a and b of a pair:

    * l = ((R_a - R_b) - (reward_a - reward_b) / beta)**2, in squared nats;
    * l_clip is the same with each step's log-ratio clipped to [old - clip, old + clip], old being its value under the
      policy that sampled the images (zeros for images of the reference); `math.inf` switches the clipping off;
    * the loss is max(l, l_clip): a step that has moved by more than `clip` gets no gradient for moving further
      towards the goal, but the full one for coming back from beyond it.

    A constant added to all rewards changes nothing, so rewards need no baseline. `old_log_ratio` and `reward` get no
    gradient. In float32 or in the higher precision of the log-ratios.

    Raises:
        ValueError: beta or clip is not positive, the shapes do not fit, or one image alone makes no pair.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive (math.inf: no clipping)")
    if log_ratio.shape != old_log_ratio.shape or log_ratio.shape[:1] != reward.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (log_ratio, old_log_ratio, reward))
        raise ValueError(f"log_ratio, old_log_ratio and reward have shapes {shapes}; needed: [B, N], [B, N] and [B]")
    if len(reward) < 2:
        raise ValueError("one image makes no pair; PRDP needs at least two images of each prompt")
    current = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    old, goal = old_log_ratio.detach().to(current.dtype), reward.detach().to(current.dtype) / beta
    free = _pair_errors(current, goal)
    return torch.maximum(free, _pair_errors(current.clamp(old - clip, old + clip), goal))


def _pair_errors(log_ratio: Tensor, goal: Tensor) -> Tensor:
    residual = log_ratio.sum(dim=1) - goal
    first, second = torch.triu_indices(len(goal), len(goal), offset=1, device=goal.device)
    return (residual[first] - residual[second]).square()
