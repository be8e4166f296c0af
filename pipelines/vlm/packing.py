"""Several completions of one prompt in one row, so that a network processes the prompt, with its media, once.

A row is the prompt and its completions one after another. Every completion reads the prompt and itself, never another
completion, and its positions continue from the prompt's end: its result equals that of a row of its own, up to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipelines.vlm.batch import VlmBatch

MOST = 0.8
"""Rows are packed if they then have at most this share of the tokens, padding counted."""

_PROMPT, _PADDING = 0, -1


@dataclass(frozen=True)
class PackedRows:
    """Rows of a network, one a prompt.

    batch: the rows; its completion_mask covers all completions of a row. back: how many tokens of other completions
    stand before each token, by which its position is to be lowered. reads: the tokens (last axis) that each token
    attends to.
    before: row and column of the token before each completion token, completion after completion.
    """

    batch: VlmBatch
    back: Int[Tensor, "rows length"]
    reads: Bool[Tensor, "rows 1 length length"]
    before: tuple[Int[Tensor, " all"], Int[Tensor, " all"]]


def sees_everything(config: Any) -> bool:
    """Tell whether every layer of the language model attends to all earlier tokens."""
    text_config = config.get_text_config()
    kinds = getattr(text_config, "layer_types", None)
    return {*kinds} <= {"full_attention"} if kinds else getattr(text_config, "sliding_window", None) is None


def saves(batch: VlmBatch) -> bool:
    """Tell whether packing saves many tokens: answers longer than their prompt save few."""
    firsts = set(batch.prompts)
    if len(firsts) == len(batch):
        return False
    lengths, said = batch.attention_mask.sum(1).tolist(), batch.completion_mask.sum(1).tolist()
    widths = dict.fromkeys(firsts, 0)
    for first, length, own in zip(batch.prompts, lengths, said, strict=True):
        widths[first] += own if widths[first] else length
    return len(firsts) * max(widths.values()) <= MOST * len(batch) * max(lengths)


def pack(batch: VlmBatch) -> PackedRows:
    """Put the completions of a batch that share a prompt into one row, padded on the right."""
    device, ids = batch.input_ids.device, batch.input_ids.cpu()
    completed, read = batch.completion_mask.cpu(), batch.attention_mask.cpu().bool()
    rows = {first: _Row(ids[first][read[first] & ~completed[first]]) for first in dict.fromkeys(batch.prompts)}
    numbers = {first: number for number, first in enumerate(rows)}
    before: tuple[list[int], list[int]] = ([], [])
    for sample, first in enumerate(batch.prompts):
        columns = rows[first].add(ids[sample][completed[sample]])
        before[0].extend([numbers[first]] * len(columns))
        before[1].extend(columns)
    kind = _padded([torch.tensor(row.kinds) for row in rows.values()], _PADDING).to(device)
    back = _padded([torch.tensor(row.back) for row in rows.values()], 0).to(device)
    seen = kind[:, None]
    return PackedRows(
        VlmBatch(
            _padded([torch.cat(row.ids) for row in rows.values()], 0).to(device),
            (kind != _PADDING).long(),
            kind > _PROMPT,
            tuple(batch.vision[first] for first in rows),
        ),
        back,
        ((seen == _PROMPT) | (seen == kind[:, :, None])).tril()[:, None],
        (torch.tensor(before[0], device=device), torch.tensor(before[1], device=device)),
    )


def _padded(rows: list[Tensor], value: int) -> Int[Tensor, "rows length"]:
    return pad_sequence(rows, batch_first=True, padding_value=value)


class _Row:
    """A row under construction: its tokens, the completion of each, and the count of others' tokens before it."""

    def __init__(self, prompt: Int[Tensor, " prompt"]) -> None:
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
