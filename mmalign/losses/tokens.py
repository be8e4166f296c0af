"""Parts of the objectives on text: sums of token log-probs, divergences of next-token distributions, differing spans.

Tensors have the shape `[batch, tokens]`; column t is the t-th token of a completion, with a mask that is True on
tokens (the end token included) and False beyond. Sums are the papers' log-probability of a response; means divide them
by the number of tokens.
"""

from __future__ import annotations

import math
from difflib import SequenceMatcher
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def completion_sum(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return the sum over the masked tokens; values outside the mask, even NaN, have no effect and no gradient."""
    return values.masked_fill(~mask, 0).sum(1)


def completion_mean(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return the mean over the masked tokens; 0 where there are none."""
    return completion_sum(values, mask) / mask.sum(1).clamp(min=1)


def sft(log_probs: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
    """Return the cross-entropy of each completion, a mean over its tokens: the SFT term of MM-DPO and RPO.

    Sources: MM-RLHF (arXiv 2502.10391) and its code; RPO (arXiv 2404.19733).
    """
    return -completion_mean(log_probs, mask)


def token_kl(
    reference_logits: Float[Tensor, "batch tokens vocabulary"],
    policy_logits: Float[Tensor, "batch tokens vocabulary"],
) -> Float[Tensor, "batch tokens"]:
    """Return KL(reference || policy) of every next-token distribution, over the whole vocabulary, in nats, >= 0.

    The forward direction of RRPO and TDPO. It is taken between log-softmaxes, so that logits of any finite size give
    a number (the log of a softmax underflows to -inf, and 0 * -inf is NaN).
    """
    reference = reference_logits.log_softmax(-1)
    return (reference.exp() * (reference - policy_logits.log_softmax(-1))).sum(-1)


def sampled_kl(
    policy: Float[Tensor, "batch tokens"],
    reference: Float[Tensor, "batch tokens"],
    *,
    estimator: Literal["k1", "k3"] = "k3",
) -> Float[Tensor, "batch tokens"]:
    """Return an estimate of KL(policy || reference) at each token from the log-probs of that token alone.

    With d = reference - policy: "k1" is -d, "k3" is exp(d) - d - 1, which is never negative and varies less
    (Schulman, "Approximating KL divergence", 2020). Both are unbiased only for tokens that the policy
    itself has sampled.

    Raises:
        ValueError: `estimator` is not known.
    """
    difference = reference - policy
    if estimator == "k1":
        return -difference
    if estimator == "k3":
        return torch.expm1(difference) - difference
    raise ValueError(f"estimator={estimator!r} is not known; allowed: 'k1', 'k3'")


def token_jsd(
    first_logits: Float[Tensor, "batch tokens vocabulary"], second_logits: Float[Tensor, "batch tokens vocabulary"]
) -> Float[Tensor, "batch tokens"]:
    """Return the Jensen-Shannon divergence of every pair of next-token distributions, in nats: 0 to log 2."""
    first, second = first_logits.log_softmax(-1), second_logits.log_softmax(-1)
    middle = torch.logaddexp(first, second) - math.log(2)
    terms = first.exp() * (first - middle) + second.exp() * (second - middle)
    return 0.5 * terms.sum(-1)


def span_masks(
    chosen: Int[Tensor, "batch chosen_tokens"],
    chosen_mask: Bool[Tensor, "batch chosen_tokens"],
    rejected: Int[Tensor, "batch rejected_tokens"],
    rejected_mask: Bool[Tensor, "batch rejected_tokens"],
) -> tuple[Bool[Tensor, "batch chosen_tokens"], Bool[Tensor, "batch rejected_tokens"]]:
    """Return which tokens of each side differ from the other side, by a diff of the two token sequences.

    What was replaced is marked on both sides, what only one side has on that side. (RRPO's released code marks
    replacements only, so that a pair that differs by an insertion has no gradient there.)
    """
    marks = torch.zeros_like(chosen_mask), torch.zeros_like(rejected_mask)
    for row in range(len(chosen)):
        sides = chosen[row][chosen_mask[row]].tolist(), rejected[row][rejected_mask[row]].tolist()
        columns = chosen_mask[row].nonzero()[:, 0], rejected_mask[row].nonzero()[:, 0]
        for kind, start, end, other_start, other_end in SequenceMatcher(None, *sides, autojunk=False).get_opcodes():
            if kind != "equal":
                marks[0][row, columns[0][start:end]] = True
                marks[1][row, columns[1][other_start:other_end]] = True
    return marks
