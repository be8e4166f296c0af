"""How pairs of answers are scored: what the methods for vision-language models share.

All sides of a pair go through a network in one call, one side of the whole batch after the other, chosen first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses import completion_mean, completion_sum
from mmalign.methods.noising import pair_accuracy
from mmalign.reference import TokenValues
from mmalign.run import Run
from pipelines.vlm_batch import VlmBatch, VlmSample


def collate(run: Run, *sides: Sequence[VlmSample]) -> VlmBatch:
    """Return samples of equally many pairs, side after side, as one batch on the model's device."""
    batch: VlmBatch = run.generator.collate([sample for side in sides for sample in side])
    return batch


def reduce_sides(values: TokenValues, sides: int, *, mean: bool = False) -> tuple[Float[Tensor, " pairs"], ...]:
    """Return the sum over the tokens of every answer, or the mean, a tensor a side."""
    log_probs, mask = values
    return (completion_mean if mean else completion_sum)(log_probs, mask).chunk(sides)


def with_answers(asked: Sequence[VlmSample], answered: Sequence[VlmSample]) -> list[VlmSample]:
    """Return the prompts and media of `asked` with the answers of `answered`."""
    return [one.with_completion(other.completion_ids.tolist()) for one, other in zip(asked, answered, strict=True)]


def token_log_probs(
    logits: Float[Tensor, "batch tokens vocabulary"], batch: VlmBatch
) -> Float[Tensor, "batch tokens"]:
    """Return the log-probability of every completion token, from the logits that predict it."""
    taken = logits.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    return torch.where(batch.token_mask, taken - logits.logsumexp(-1), 0.0)


def answer_metrics(
    policy: Sequence[Tensor], reference: Sequence[Tensor], logit: Float[Tensor, " pairs"]
) -> dict[str, Tensor]:
    """Return what to watch of a loss on two sides: log-probs of whole answers, whose difference alone can deceive.

    A logit can rise while both answers become less likely: `policy_chosen` must not fall far below
    `reference_chosen`.
    """
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    values = (*policy[:2], *reference[:2])
    means = {name: value.detach().mean() for name, value in zip(names, values, strict=True)}
    return {"accuracy": pair_accuracy(logit.detach()), "logit": logit.detach().mean(), **means}
