"""Labelled images encoded once, by the same cache as pairs, and returned as `LabelBatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.io.images import Media
from mmalign.data.batches import LabelBatch
from mmalign.data.encoded.cache import CachedImages, encode_table
from mmalign.data.labels import LabelRecord, LabelTable


@dataclass(kw_only=True)
class CachedLabels(CachedImages):
    """Encoded images with their labels; `rejected_slots` number the captions that do not fit, None if there are none.

    An image without such a caption among others that have one has -1.
    """

    good: Bool[Tensor, " images"]
    rejected_slots: Int[Tensor, " images"] | None

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> LabelBatch:
        """Return these images, in this order, on the CPU in float32."""
        ids, (images,), rows = self.sides(indices, epoch, seed)
        rejected = None
        if self.rejected_slots is not None:
            slots = self.rejected_slots[rows]
            rejected = self._condition(torch.where(slots < 0, self.prompt_slots[rows], slots), rows, epoch, seed)
        cond = self._condition(self.prompt_slots[rows], rows, epoch, seed)
        return LabelBatch(images, self.good[rows], cond, ids, epoch, rejected)

    def facts(self, index: int) -> tuple[str | float, ...]:
        """Return the content of the image and its label."""
        return *super().facts(index), float(self.good[index])


def build_label_cache(
    table: LabelTable,
    generator: Any,
    data: DataConfig,
    progress: Callable[[int], None] | None = None,
) -> CachedLabels:
    """Encode what the cache does not hold yet and return the images ready for training; see `encode_table`.

    Raises:
        UserError: an image cannot be read; the message names it.
    """
    encoded = encode_table(table, _image, generator, data, progress)
    rejected = torch.tensor(table.rejected_indices())[encoded["kept"]]
    return CachedLabels(
        **encoded,
        good=torch.tensor(table.labels())[encoded["kept"]],
        rejected_slots=None if bool((rejected < 0).all()) else rejected,
    )


def _image(record: LabelRecord) -> dict[str, Media]:
    return {f"image '{record.id}'": record.image}
