"""The order of the data: a seeded permutation an epoch, cut into steps, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from mmalign.core.seeds import derive_seed
from mmalign.data.batches import ComparisonBatch, LabelBatch, PairBatch, PromptBatch, VlmPairBatch


class Samples(Protocol):
    """The encoded data of a run: `CachedPairs`, `CachedLabels`, `CachedPrompts` or `VlmPairs`."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batch(
        self, indices: Sequence[int], epoch: int, seed: int
    ) -> PairBatch | LabelBatch | PromptBatch | ComparisonBatch | VlmPairBatch:
        """Return these samples; their randomness depends on (seed, id, epoch) alone."""
        ...


class BatchSampler:
    """Samples batches: the samples of step N depend only on the seed and on the number of samples a step.

    A step takes batch_size x accumulation x world_size consecutive samples of its epoch's permutation, so the same
    recipe gives the same steps however that product is made up; a pair is sampled as a whole. What remains at the end
    of an epoch and fills no step is left out of it (others in every epoch).
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare; there must be enough samples for one step."""
        self.samples, self.seed, self.device = samples, seed, device
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world_size = rank, world_size
        self.per_step = batch_size * accumulation * world_size
        self.steps_per_epoch = len(samples) // self.per_step
        self._order: tuple[int, list[int]] = (-1, [])
        if not self.steps_per_epoch:
            raise ValueError(f"{len(samples)} samples do not fill one step of {self.per_step}")

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def micro_batches(self, step: int) -> Iterator[Any]:
        """Yield this rank's micro-batches of a step (0-based), one per forward pass, on the device."""
        epoch = self.epoch_of(step)
        start = step % self.steps_per_epoch * self.per_step
        for micro in range(self.accumulation):
            first = start + (micro * self.world_size + self.rank) * self.batch_size
            indices = self._permutation(epoch)[first : first + self.batch_size]
            yield self.samples.batch(indices, epoch, self.seed).to(self.device)

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            source = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._order = (epoch, torch.randperm(len(self.samples), generator=source).tolist())
        return self._order[1]
