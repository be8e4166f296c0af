"""The choice of the next token: greedy or sampled by a generator for each sample, and never a vision token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class NextToken:
    """A logits processor after which the largest score is the chosen token.

    Sampling is by Gumbel's trick (argmax of log p plus Gumbel noise is a draw from p), each row with a generator of
    its own, so that a sample's answer depends neither on its batch nor on the global random state.
    """

    def __init__(self, banned: Collection[int], temperature: float, top_p: float, seeds: Sequence[int] | None) -> None:
        """Prepare one generation; `seeds` has one number a row and is None for greedy decoding."""
        self.banned = torch.tensor(sorted(banned), dtype=torch.long)
        self.temperature = temperature
        self.top_p = top_p
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Return the scores whose largest is to be taken."""
        scores = scores.float().index_fill(1, self.banned.to(scores.device), -torch.inf)
        if self.generators is None:
            return scores
        log_probs = nucleus(torch.log_softmax(scores / self.temperature, dim=1), self.top_p)
        # -log of an exponential variable is Gumbel noise.
        waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=rng) for rng in self.generators])
        return log_probs - waits.to(scores.device).log()


def nucleus(log_probs: Float[Tensor, "batch vocabulary"], top_p: float) -> Float[Tensor, "batch vocabulary"]:
    """Leave the fewest tokens whose probabilities sum to at least `top_p`, most probable first (arXiv 1904.09751)."""
    if top_p >= 1:
        return log_probs
    ordered, order = log_probs.sort(dim=1, descending=True)
    before = ordered.exp().cumsum(1) - ordered.exp()
    return log_probs.masked_fill(
        torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, order, before >= top_p), -torch.inf
    )
