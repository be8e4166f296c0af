"""Several completions of one prompt in one row, so that a network sees the prompt, with its media, once.

A row is the prompt and its completions one after another. Every completion reads the prompt and itself, never another
completion, and its positions go on from the prompt's end: what is computed for it is what a row of its own would give,
up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipelines.vlm_batch import VlmBatch

_PROMPT, _PADDING = 0, -1


@dataclass(frozen=True)
class PackedRows:
    """Rows of a network, one a prompt.

    batch: the rows; its completion_mask covers all completions of a row. back: how many tokens of other completions
    stand before each token, by which its position is to be lowered. reads: which tokens (last axis) each token sees.
    before: row and column of the token before each completion token, completion after completion.
    """

    batch: VlmBatch
    back: Int[Tensor, "rows length"]
    reads: Bool[Tensor, "rows 1 length length"]
    before: tuple[Int[Tensor, " all"], Int[Tensor, " all"]]


def pack(batch: VlmBatch) -> PackedRows:
    """Put the completions of a batch that share a prompt into one row, padded on the right."""
    device = batch.input_ids.device
    firsts = list(dict.fromkeys(batch.prompts))
    parts = [_Row(batch, first) for first in firsts]
    places: list[tuple[int, list[int]]] = [(0, [])] * len(batch)
    for sample, first in enumerate(batch.prompts):
        row = firsts.index(first)
        places[sample] = (row, parts[row].add(batch.input_ids[sample][batch.completion_mask[sample]]))
    ids = pad_sequence([torch.cat(row.ids) for row in parts], batch_first=True)
    kind, back = (
        pad_sequence([torch.tensor(values) for values in column], batch_first=True, padding_value=_PADDING).to(device)
        for column in ([row.kinds for row in parts], [row.back for row in parts])
    )
    kind_of_read = kind[:, None]
    reads = (kind_of_read == _PROMPT) | (kind_of_read == kind[:, :, None])
    rows = torch.tensor([row for row, columns in places for _ in columns], device=device)
    columns = torch.tensor([column for _, columns in places for column in columns], device=device)
    return PackedRows(
        VlmBatch(ids, (kind != _PADDING).long(), kind > _PROMPT, tuple(batch.vision[first] for first in firsts)),
        back.clamp(min=0),
        reads.tril()[:, None],
        (rows, columns),
    )


class _Row:
    """A row as it grows: its tokens, the completion that each belongs to, and the tokens of others before it."""

    def __init__(self, batch: VlmBatch, first: int) -> None:
        prompt = batch.input_ids[first][batch.attention_mask[first].bool() & ~batch.completion_mask[first]]
        self.prompt = len(prompt)
        self.ids = [prompt]
        self.kinds = [_PROMPT] * self.prompt
        self.back = [0] * self.prompt

    def add(self, completion: Int[Tensor, " tokens"]) -> list[int]:
        """Append a completion, and return the columns of the tokens before its own."""
        start, count = len(self.kinds), len(completion)
        self.kinds += [len(self.ids)] * count
        self.ids.append(completion)
        self.back += [start - self.prompt] * count
        return [self.prompt - 1, *range(start, start + count - 1)]
