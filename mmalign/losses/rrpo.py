"""RRPO: rewards on the tokens in which two aligned completions differ, and a token-wise bound on the chosen one.

Source: Sarkar and Etemad, "Self-alignment of Large Video Language Models with Refined Regularized Preference
Optimization" (arXiv 2504.12083), in the convention of the authors' code (pritamqu/RRPO): the divergence is added (the
paper's formula, read literally, would reward it), and beta multiplies the margin.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.losses.dpo import dpo_logit
from mmalign.losses.tokens import completion_sum


def rrpo_logit(
    policy_chosen: Float[Tensor, "batch chosen_tokens"],
    policy_rejected: Float[Tensor, "batch rejected_tokens"],
    reference_chosen: Float[Tensor, "batch chosen_tokens"],
    reference_rejected: Float[Tensor, "batch rejected_tokens"],
    chosen_differs: Bool[Tensor, "batch chosen_tokens"],
    rejected_differs: Bool[Tensor, "batch rejected_tokens"],
    *,
    beta: float | Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Return DPO's z with sums over the differing tokens only (see `span_masks`); with all tokens marked it is DPO's.

    The paper sums phrase by phrase; only the total enters, so the grouping of tokens into phrases does not matter.
    """
    return dpo_logit(
        completion_sum(policy_chosen, chosen_differs),
        completion_sum(policy_rejected, rejected_differs),
        completion_sum(reference_chosen, chosen_differs),
        completion_sum(reference_rejected, rejected_differs),
        beta=beta,
    )


def rrpo(
    z: Float[Tensor, " batch"],
    chosen_kl: Float[Tensor, "batch chosen_tokens"],
    chosen_mask: Bool[Tensor, "batch chosen_tokens"],
    *,
    alpha: float = 0.01,
) -> Float[Tensor, " batch"]:
    """Return -log sigmoid(z) + alpha * sum of the divergence over the chosen completion; log 2 at the reference.

    z: `rrpo_logit`. chosen_kl: `token_kl(reference, policy)` on the chosen completion; beta does not scale it.

    Raises:
        ValueError: alpha is negative.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha} must not be negative, which would reward the divergence")
    return -F.logsigmoid(z) + alpha * completion_sum(chosen_kl, chosen_mask)
