"""Labelled segments of videos as shares of latent frames, for a loss that compares the sides segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.batches import Segments
from mmalign.data.pairs import PairTable


def latent_times(frames: int, step: int, rate: float) -> Float[Tensor, " frames"]:
    """Return the middle, in seconds, of the frames that each latent frame stands for.

    A causal video autoencoder makes one latent frame of the first frame and one of each `step` that follow.

    >>> latent_times(3, 4, 8.0)
    tensor([0.0000, 0.3125, 0.8125], dtype=torch.float64)
    """
    places = torch.arange(frames, dtype=torch.float64)
    return torch.where(places == 0, 0.0, (places - 1) * step + (step + 1) / 2) / rate


def cut_segments(
    table: PairTable, generator: Any, kept: Int[Tensor, " pairs"], rates: Float[Tensor, " pairs"] | None
) -> Segments | None:
    """Return the segments of the pairs kept, None where the table has none; `rates` are frames a second of each pair.

    A latent frame belongs to the segment that holds the middle of its frames.

    Raises:
        UserError: images have segments, or those of a pair overlap.
    """
    told = [table.clip(index).segments for index in kept.tolist()]
    most = max((len(segments) for segments in told), default=0)
    if not most:
        return None
    if rates is None:
        raise UserError(f"{table.name}: has segments, which are parts of videos, and the model makes images")
    frames, step = generator.latent_shape[1], generator.frame_step
    front = frames - (generator.media_shape[0] - 1) // step - 1  # copies of the first latent frame (CogVideoX 1.5)
    labels, shares = torch.zeros(len(told), most), torch.zeros(len(told), most, frames)
    for pair, segments in enumerate(told):
        times = latent_times(frames - front, step, float(rates[pair]))
        times = torch.cat([times[:1].expand(front), times])
        if not segments:  # labelled as a whole
            labels[pair, 0], shares[pair, 0] = 1.0, 1.0 / frames
        for place, one in enumerate(segments):
            inside = ((times >= one.start) & (times < one.end)).float()
            shares[pair, place] = inside / inside.sum().clamp(min=1)
            # A segment between two latent frames, or beyond the frames taken, says nothing about them.
            labels[pair, place] = one.label if bool(inside.any()) else 0.0
        if bool(((shares[pair] > 0).sum(0) > 1).any()):
            raise UserError(f"{table.name}: the segments of pair '{table.ids[int(kept[pair])]}' overlap")
    return Segments(labels.sign(), shares)
