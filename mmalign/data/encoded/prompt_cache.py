"""Prompts of an online method encoded once, and returned as `PromptBatch`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmalign.config.sections import DataConfig
from mmalign.data.batches import PromptBatch
from mmalign.data.encoded.cache import PromptEncoder, cache_folder
from mmalign.data.encoded.store import MEMORY_LIMIT, Rows
from pipelines.conditioning import Conditioning


@dataclass
class CachedPrompts:
    """Prompts in order, their ids and their embeddings; `rows[slots[i]]` belongs to prompt i."""

    prompts: list[str]
    ids: list[str]
    rows: Rows
    slots: torch.Tensor

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> PromptBatch:
        """Return these prompts, in this order, on the CPU; nothing in them is random."""
        chosen = list(indices)
        return PromptBatch(
            prompts=[self.prompts[index] for index in chosen],
            cond=Conditioning.from_tensors(self.rows[self.slots[chosen]]),
            ids=[self.ids[index] for index in chosen],
            epoch=epoch,
        )


def build_prompt_cache(prompts: Sequence[str], generator: Any, data: DataConfig) -> CachedPrompts:
    """Encode each distinct prompt that the cache does not hold yet and return all of them ready for training.

    A prompt's id is its text and the number of its occurrence, so that a repeated one gets other noise.
    """
    distinct = list(dict.fromkeys(prompts))
    rows = PromptEncoder(cache_folder(data), generator, batch_size=64).encode(distinct, MEMORY_LIMIT)
    slot_of = {text: slot for slot, text in enumerate(distinct)}
    seen: Counter[str] = Counter()
    ids = []
    for text in prompts:
        ids.append(f"{text}#{seen[text]}")
        seen[text] += 1
    return CachedPrompts(list(prompts), ids, rows, torch.tensor([slot_of[text] for text in prompts]))
