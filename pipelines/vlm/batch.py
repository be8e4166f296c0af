"""Samples for a vision-language model, and batches of them: token ids on one side of the padding or the other.

Vision is kept sample by sample; it is joined only when a model runs, and never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from pipelines.vlm.families import Vision

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class VlmSample:
    """One prompt with its media, and perhaps a completion.

    prompt_ids hold as many placeholders as the media make features. separator: the chat format's text between the
    prompt and a completion.
    """

    prompt_ids: Int[Tensor, " prompt"]
    vision: Vision
    separator: str = ""
    completion_ids: Int[Tensor, " completion"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def with_completion(self, ids: Sequence[int]) -> VlmSample:
        """Return the same prompt and media with another completion."""
        return replace(self, completion_ids=torch.tensor(ids, dtype=torch.long))

    def __len__(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class VlmBatch:
    """Padded token ids, masks of real tokens and of completions, and every sample's vision.

    prompts: for every sample the first one that has the very same prompt and media (by default none shares them).
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    completion_mask: Bool[Tensor, "batch length"]
    vision: tuple[Vision, ...]
    prompts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Treat all prompts as different by default."""
        if not self.prompts:
            object.__setattr__(self, "prompts", tuple(range(len(self))))

    def __len__(self) -> int:
        """Samples."""
        return len(self.input_ids)

    @property
    def token_mask(self) -> Bool[Tensor, "batch tokens"]:
        """Which columns are tokens, when every completion starts at column 0."""
        lengths = self.completion_mask.sum(1)
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    @property
    def completion_ids(self) -> Int[Tensor, "batch tokens"]:
        """The tokens of the completions, from column 0 on; 0 beyond their ends."""
        return self.by_column(self.input_ids[self.completion_mask])

    def by_column(self, values: Shaped[Tensor, "all *rest"]) -> Shaped[Tensor, "batch tokens *rest"]:
        """Lay out values of all completion tokens, given one after another, as a row a sample; 0 beyond ends."""
        mask = self.token_mask
        rows = values.new_zeros(*mask.shape, *values.shape[1:])
        rows[mask] = values
        return rows

    def select(self, indices: Sequence[int]) -> VlmBatch:
        """Return some samples, in that order, with the same padding."""
        chosen = torch.tensor(list(indices), device=self.input_ids.device)
        tensors = (self.input_ids[chosen], self.attention_mask[chosen], self.completion_mask[chosen])
        prompts = [self.prompts[index] for index in indices]
        return VlmBatch(*tensors, tuple(self.vision[index] for index in indices), tuple(map(prompts.index, prompts)))

    def to(self, device: str | torch.device) -> VlmBatch:
        """Return the batch on another device."""
        tensors = (self.input_ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device))
        first = {
            index: {name: one.to(device) for name, one in self.vision[index].items()} for index in {*self.prompts}
        }
        return VlmBatch(*tensors, tuple(first[index] for index in self.prompts), self.prompts)


def collate(
    samples: Sequence[VlmSample], pad_id: int, *, padding_side: PaddingSide = "right", length: int | None = None
) -> VlmBatch:
    """Pad samples to the longest of them, or to `length` if that is longer."""
    width = max(length or 0, *(len(sample) for sample in samples))
    ids = torch.full((len(samples), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        start = width - len(sample) if padding_side == "left" else 0
        end = start + len(sample)
        ids[row, start:end] = torch.cat([sample.prompt_ids, sample.completion_ids])
        attention[row, start:end] = 1
        completion[row, start + len(sample.prompt_ids) : end] = True
    # Completions of one encoded prompt hold its very tensors.
    prompts = [(id(sample.prompt_ids), id(sample.vision)) for sample in samples]
    vision = tuple(sample.vision for sample in samples)
    return VlmBatch(ids, attention, completion, vision, tuple(map(prompts.index, prompts)))
