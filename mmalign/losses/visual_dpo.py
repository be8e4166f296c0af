"""Preferences between media: a completion should be likelier given the right video or image than given another one.

Sources: VDPO of PaMi-VDPO (Ding et al., arXiv 2504.05810); the visual term of rDPO (Xing et al., "Re-Align", arXiv
2502.13146) and, with an anchor, mDPO (Wang et al., arXiv 2406.11839). All are DPO's formula, whose "rejected" side is
the chosen completion given other media.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.losses.dpo import chosen_anchor, dpo


def vdpo(
    policy: Float[Tensor, " batch"],
    policy_perturbed: Float[Tensor, " batch"],
    reference: Float[Tensor, " batch"],
    reference_perturbed: Float[Tensor, " batch"],
    *,
    beta: float | Float[Tensor, " batch"],
    weight: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return -log sigmoid(beta * (Delta given the media - Delta given perturbed media)), times `weight`.

    Delta is the log-prob of the one completion under the policy minus that under the reference.

    Log 2, with no gradient, where the perturbation changes nothing. The loss can fall by lowering the log-prob given
    perturbed media alone, or both: add `chosen_anchor`.

    Raises:
        ValueError: beta is not positive.
    """
    loss = dpo(policy, policy_perturbed, reference, reference_perturbed, beta=beta)
    return loss if weight is None else weight.detach() * loss


def rdpo(
    policy: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]],
    reference: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]],
    *,
    beta: float | Float[Tensor, " batch"],
    visual_weight: float = 1.0,
    anchor_weight: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return DPO's loss plus that of the visual preference, and mDPO's anchor if it has a weight.

    policy, reference: log-probs of the chosen completion, the rejected completion, and the chosen completion given
    other media (retrieved in rDPO, cropped in mDPO). 2 log 2 at the reference; 3 log 2 with the anchor at weight 1,
    which is mDPO.

    Raises:
        ValueError: beta is not positive or a weight is negative.
    """
    if visual_weight < 0 or anchor_weight < 0:
        raise ValueError(f"visual_weight={visual_weight} and anchor_weight={anchor_weight} must not be negative")
    chosen, rejected, unseen = policy
    loss = dpo(chosen, rejected, reference[0], reference[1], beta=beta)
    loss = loss + visual_weight * vdpo(chosen, unseen, reference[0], reference[2], beta=beta)
    return loss + anchor_weight * chosen_anchor(chosen, reference[0], beta=beta) if anchor_weight else loss


def runner_up_log_probs(
    logits: Float[Tensor, "batch tokens vocabulary"], ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Return the log-prob of the likeliest token other than the given one, at each position.

    The released code of Re-Align (taco-group/Re-Align) scores these for the rejected completion and for the chosen one
    given other media, separately for policy and reference; the paper scores the tokens themselves. It is kept for
    comparison.
    """
    others = logits.scatter(-1, ids[..., None], -float("inf")).max(-1).values
    return others - logits.logsumexp(-1)


def select_by_divergence(
    divergence: Float[Tensor, "batch candidates"],
    relevance: Float[Tensor, "batch candidates"],
    *,
    least_relevance: float = 0.5,
    full_weight_at: float = 0.05,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Choose for each sample the perturbation with the largest divergence among those that show the same scene.

    Close to far, as PaMi-VDPO describes: candidates whose vision features have a cosine `relevance` of at least
    `least_relevance` to the media's stay; of them the one with the largest `divergence` (mean `token_jsd` of the
    completion's next-token distributions given the media and the candidate) is taken. Its weight is divergence /
    full_weight_at, at most 1, so that a perturbation that is irrelevant to the prompt has a small weight. The paper
    gives no formula for thresholds and weights: both are ours.

    Returns the index of the candidate and its weight, which is 0 (and the index 0) where no candidate is left.

    Raises:
        ValueError: `full_weight_at` is not positive.
    """
    if not full_weight_at > 0:
        raise ValueError(f"full_weight_at={full_weight_at} must be positive")
    stays: Bool[Tensor, "batch candidates"] = relevance >= least_relevance
    best, index = divergence.detach().masked_fill(~stays, 0).max(1)
    return index, (best / full_weight_at).clamp(0, 1)
