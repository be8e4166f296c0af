"""KTO's reference point over a whole optimiser step, however its samples are divided into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core import distributed
from mmalign.data.batches import LabelBatch
from mmalign.losses import kto_reference_point


@dataclass(frozen=True)
class Centred:
    """A micro-batch and the reference point of its step, `[]`; None where the micro-batch is the whole step."""

    labels: LabelBatch
    point: Float[Tensor, ""] | None = None

    @classmethod
    def of(cls, batch: Centred | LabelBatch) -> Centred:
        """Return the batch itself, or one that is a step of its own."""
        return batch if isinstance(batch, Centred) else cls(batch)

    def reference_point(self, gain: Float[Tensor, " images"]) -> Float[Tensor, ""]:
        """Return the mean gain of the step over all processes; `gain` is that of this micro-batch."""
        return distributed.mean(kto_reference_point(gain)) if self.point is None else self.point


def centred(batches: Iterable[LabelBatch], gain: Callable[[LabelBatch], Float[Tensor, " images"]]) -> list[Centred]:
    """Return the micro-batches of a step with the mean of `gain` over all of them, and over all processes.

    With one micro-batch the loss itself knows the mean. With more, `gain` (the reference's error less the policy's) is
    found in a pass of its own without a gradient, which makes a step about a third slower, and its gradient the same
    as that of one large micro-batch.
    """
    held = list(batches)
    if len(held) == 1:
        return [Centred(held[0])]
    with torch.no_grad():
        point = distributed.mean(torch.stack([kto_reference_point(gain(batch)) for batch in held]).mean())
    return [Centred(batch, point) for batch in held]
