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
from mmalign.data.encoded.first_frames import FirstFrameEncoder, FirstFrames, starts_from_image
from mmalign.data.encoded.store import MEMORY_LIMIT, Rows
from mmalign.data.encoded.transforms import Decision
from mmalign.data.prompts import Prompt
from pipelines.conditioning import Conditioning


@dataclass
class CachedPrompts:
    """Prompts in order, their ids and their embeddings; `rows[slots[i]]` belongs to prompt i."""

    prompts: list[str]
    ids: list[str]
    rows: Rows
    slots: torch.Tensor
    first_frames: FirstFrames | None = None
    """The images that the videos of the prompts start from; None for a model that is not given them."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    def facts(self) -> list[str]:
        """Return what identifies the data: the prompts, and what they are given of their first frames."""
        first = self.first_frames
        return self.prompts + ([] if first is None else [first.keys[slot] for slot in first.slots[:, 0].tolist()])

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> PromptBatch:
        """Return these prompts, in this order, on the CPU; nothing in them is random."""
        chosen = list(indices)
        tensors = self.rows[self.slots[chosen]]
        if self.first_frames is not None:
            tensors |= self.first_frames.take(torch.tensor(chosen), torch.zeros(len(chosen), dtype=torch.long))
        return PromptBatch(
            prompts=[self.prompts[index] for index in chosen],
            cond=Conditioning.from_tensors(tensors),
            ids=[self.ids[index] for index in chosen],
            epoch=epoch,
        )


def build_prompt_cache(prompts: Sequence[str | Prompt], generator: Any, data: DataConfig) -> CachedPrompts:
    """Encode what the cache does not hold yet of prompts and first frames, and return all of it ready for training.

    A prompt's id is its text and the number of its occurrence, so that a repeated one gets other noise.

    Raises:
        UserError: a first frame cannot be read.
    """
    given = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    texts = [prompt.text for prompt in given]
    distinct = list(dict.fromkeys(texts))
    rows = PromptEncoder(cache_folder(data), generator, batch_size=64).encode(distinct, MEMORY_LIMIT)
    slot_of = {text: slot for slot, text in enumerate(distinct)}
    seen: Counter[str] = Counter()
    ids = []
    for text in texts:
        ids.append(f"{text}#{seen[text]}")
        seen[text] += 1
    firsts = _first_frames(given, generator, data) if starts_from_image(generator, data) else None
    return CachedPrompts(texts, ids, rows, torch.tensor([slot_of[text] for text in texts]), firsts)


def _first_frames(prompts: Sequence[Prompt], generator: Any, data: DataConfig) -> FirstFrames:
    encoder = FirstFrameEncoder(cache_folder(data), generator)
    slots = [encoder.add(f"prompt '{one.text}'", one.first_frame, Decision()) for one in prompts]
    return encoder.finish(slots, MEMORY_LIMIT)
