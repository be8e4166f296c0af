"""Dense-reward DPO: preference over whole sampling chains, in which early steps have larger weights.

Source: Yang, Chen and Zhou, "A Dense Reward View on Aligning Text-to-Image Diffusion with Preference" (arXiv
2402.08265), in the convention of the authors' code (Shentao-YANG/Dense_Reward_T2I); ranking of more than two images:
ListMLE (Xia et al., "Listwise Approach to Learning to Rank", ICML 2008).

A chain is worth sum_k gamma^k r_k, k = 0 being the first and noisiest sampling step, so Bradley-Terry is applied to
sum_k gamma^k rho_k with rho the log-ratio of policy to reference, a MEAN over latent dimensions. Few steps are
computed: drawn with probability proportional to gamma^k, their plain mean has the expectation sum_k gamma^k rho_k /
sum_k gamma^k. All images that are compared share the drawn steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def discounted_probabilities(steps: int, gamma: float) -> Float[Tensor, " steps"]:
    """Return gamma^k / sum_j gamma^j for k = 0..steps - 1, float64: uniform at gamma = 1, step 0 alone as gamma -> 0.

    Raises:
        ValueError: gamma is outside (0, 1], or there is no step.
    """
    if not 0 < gamma <= 1 or steps < 1:
        raise ValueError(f"gamma={gamma} must lie in (0, 1] and steps={steps} be at least 1")
    weights = torch.pow(gamma, torch.arange(steps, dtype=torch.float64))
    return weights / weights.sum()


def dense_logit(
    log_ratio: Float[Tensor, "steps batch"], counts: Int[Tensor, "steps batch"], *, scale: float, clip: float
) -> Float[Tensor, " batch"]:
    """Return scale * the mean of clamp(log_ratio, -clip, clip) over the drawn steps of each image.

    `counts` says how often each step was drawn. The clamp is the code's: |logit| <= scale * clip, and a step beyond it
    has no gradient in either direction; `math.inf` switches it off. In float32 or a higher precision.

    Raises:
        ValueError: scale or clip is not positive, the shapes differ, or for some image no step was drawn.
    """
    if not scale > 0 or not clip > 0:
        raise ValueError(f"scale={scale} and clip={clip} must be positive (clip=math.inf: no clamp)")
    if log_ratio.shape != counts.shape:
        raise ValueError(f"log_ratio has shape {tuple(log_ratio.shape)}, counts {tuple(counts.shape)}; must be equal")
    drawn = counts.sum(0)
    if not bool((drawn > 0).all()):
        raise ValueError("every image needs at least one drawn step; leave out images without one")
    rho = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32)).clamp(-clip, clip)
    return scale * (counts * rho).sum(0) / drawn


def list_mle(logit: Float[Tensor, "lists images"], reward: Float[Tensor, "lists images"]) -> Float[Tensor, " lists"]:
    """Return -log P(the images of a list are drawn best first), without replacement, by softmax of their logits.

    -sum_i log(exp(z_i) / sum_{j >= i} exp(z_j)) with z sorted by falling reward. Two images: -log sigmoid(z_better -
    z_worse), Bradley-Terry. Images of equal reward rank in the order given: shuffle them first. No gradient reaches
    the reward.

    Raises:
        ValueError: the shapes differ, or there are not two images to compare.
    """
    if logit.shape != reward.shape or logit.shape[-1] < 2:
        raise ValueError(
            f"logit has shape {tuple(logit.shape)}, reward {tuple(reward.shape)}; needed: equal, two images or more"
        )
    order = reward.argsort(dim=-1, descending=True, stable=True)
    ranked = logit.gather(-1, order)
    rest = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - ranked).sum(-1)
