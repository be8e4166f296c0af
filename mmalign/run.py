"""What a method sees of a training run: the model, its reference, and random draws that depend on the sample alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mmalign.batches import PairBatch
from mmalign.reference import Reference
from mmalign.seeds import derive_seed
from pipelines.conditioning import Conditioning

Autocast = Callable[[], AbstractContextManager[Any]]


class Run:
    """The view of a run that is handed to `Method.loss` and `Method.collect`.

    Attributes: `generator` (pipelines), `process` (its noise process), `reference`, `rewards` (by name), `seed`, and
    `step`, the number of optimiser steps done so far.
    """

    def __init__(
        self,
        generator: Any,
        *,
        seed: int = 0,
        reference: Reference | None = None,
        rewards: dict[str, Any] | None = None,
        autocast: Autocast = nullcontext,
    ) -> None:
        """Bring the parts together; `autocast` makes the context in which the network is called."""
        self.generator = generator
        self.process = generator.process
        self.seed = seed
        self.rewards = rewards or {}
        self.autocast = autocast
        self.step = 0
        self._reference = reference

    @property
    def reference(self) -> Reference:
        """The frozen starting point of the training.

        Raises:
            RuntimeError: the method did not declare that it needs one, so none was kept.
        """
        if self._reference is None:
            raise RuntimeError("no reference was kept: declare it, `needs = Needs(..., reference=True)`")
        return self._reference

    def predict(
        self, x_t: Float[Tensor, "batch *latent"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch *latent"]:
        """Return the policy's output, with its graph, in the run's precision; the result is float32."""
        # Autocast ends with each call: its cache of cast weights must not outlive a reference call, whose casts have
        # no graph.
        with self.autocast():
            return self.generator.predict(x_t, t, cond).float()

    def noise_like(
        self, x: Float[Tensor, "batch *latent"], ids: Sequence[str], epoch: int, purpose: str = "noise"
    ) -> Float[Tensor, "batch *latent"]:
        """Return standard normal noise, each sample's from (seed, purpose, id, epoch).

        Drawn on the CPU, one generator a sample: the same on every device, in any batch, on any rank, after a resume.
        """
        noise = torch.empty(x.shape, dtype=torch.float32)
        source = torch.Generator()
        for row, sample_id in zip(noise, ids, strict=True):
            source.manual_seed(derive_seed(self.seed, purpose, sample_id, epoch))
            torch.randn(row.shape, generator=source, out=row)
        return noise.to(x.device)

    def timesteps(self, batch: PairBatch, low: int = 0, high: int | None = None) -> Shaped[Tensor, " batch"]:
        """Return one training timestep a sample in [low, high), from (seed, id, epoch) as for `noise_like`."""
        source = torch.Generator()
        drawn = []
        for sample_id in batch.ids:
            source.manual_seed(derive_seed(self.seed, "timestep", sample_id, batch.epoch))
            drawn.append(self.process.sample_timesteps(1, generator=source, low=low, high=high))
        return torch.cat(drawn).to(batch.chosen.device)
