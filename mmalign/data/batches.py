"""The encoded batch of one forward pass, for each kind of method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.vlm.batch import VlmSample


@dataclass(frozen=True)
class Segments:
    """Parts of pairs of videos: `shares[pair, segment]` are the shares of the latent frames in the segment's mean.

    A segment's label is 1 where the chosen video is better in it, -1 where the rejected one is. It is 0 where neither
    is, or where a pair has fewer segments than others.
    """

    labels: Float[Tensor, "batch segments"]
    shares: Float[Tensor, "batch segments frames"]

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return both tensors."""
        return self.labels, self.shares

    def select(self, rows: Int[Tensor, " rows"]) -> Segments:
        """Return the segments of some pairs."""
        return Segments(self.labels[rows], self.shares[rows])

    def to(self, device: torch.device | str) -> Segments:
        """Return the segments on another device."""
        return Segments(self.labels.to(device), self.shares.to(device))


@dataclass
class PairBatch:
    """A batch of preference pairs, encoded: both sides of a pair share the prompt, the id and so every random draw."""

    chosen: Float[Tensor, "batch *latent"]
    rejected: Float[Tensor, "batch *latent"]
    cond: Conditioning
    ids: list[str]
    epoch: int = 0
    margins: Float[Tensor, " batch"] | None = None
    """Score of chosen minus score of rejected, NaN for a pair without scores; None if no pair of the data has any."""
    weights: Float[Tensor, " batch"] | None = None
    """Weight of each pair in the loss; None: 1."""
    segments: Segments | None = None
    """The parts of each pair of videos that were labelled apart; None if no pair of the data has any."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> PairBatch:
        """Return the batch on another device."""
        return replace(
            self,
            chosen=self.chosen.to(device),
            rejected=self.rejected.to(device),
            cond=self.cond.to(device=device),
            margins=None if self.margins is None else self.margins.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            segments=None if self.segments is None else self.segments.to(device),
        )


@dataclass
class ComparisonBatch:
    """A batch of preference pairs for a reward to learn from: encoded images, the prompts as text.

    `preference` is 1, or 1/2 for a tie; `weights` let every prompt count alike.
    """

    chosen: Float[Tensor, "batch *latent"]
    rejected: Float[Tensor, "batch *latent"]
    prompts: list[str]
    preference: Float[Tensor, " batch"]
    weights: Float[Tensor, " batch"]
    ids: list[str]
    epoch: int = 0

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> ComparisonBatch:
        """Return the batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("chosen", "rejected", "preference", "weights")}
        return replace(self, **moved)


@dataclass
class LabelBatch:
    """A batch of single images, each good or bad for its prompt, encoded."""

    images: Float[Tensor, "batch *latent"]
    desirable: Bool[Tensor, " batch"]
    cond: Conditioning
    ids: list[str]
    epoch: int = 0
    rejected_cond: Conditioning | None = None
    """A caption for each image that does not fit it; None if the data have none."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> LabelBatch:
        """Return the batch on another device."""
        return replace(
            self,
            images=self.images.to(device),
            desirable=self.desirable.to(device),
            cond=self.cond.to(device=device),
            rejected_cond=None if self.rejected_cond is None else self.rejected_cond.to(device=device),
        )


@dataclass
class PromptBatch:
    """Prompts for a method that makes its own samples, encoded; `ids` tell equal prompts of one set apart."""

    prompts: list[str]
    cond: Conditioning
    ids: list[str]
    epoch: int = 0

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the batch on another device."""
        return replace(self, cond=self.cond.to(device=device))

    def select(self, rows: Int[Tensor, " rows"]) -> PromptBatch:
        """Return some of the prompts, by their numbers."""
        chosen = rows.tolist()
        return PromptBatch(
            prompts=[self.prompts[row] for row in chosen],
            cond=self.cond[rows],
            ids=[self.ids[row] for row in chosen],
            epoch=self.epoch,
        )

    def repeat(self, times: int) -> PromptBatch:
        """Return the batch with every prompt `times` times in a row, each with an id of its own."""
        return PromptBatch(
            prompts=[prompt for prompt in self.prompts for _ in range(times)],
            cond=self.cond.repeat_interleave(times),
            ids=[f"{name}/{index}" for name in self.ids for index in range(times)],
            epoch=self.epoch,
        )


class TimedMedia(NamedTuple):
    """The media of one prompt: images `[3, H, W]` or a video `[F, 3, H, W]`, uint8, and its frames a second."""

    media: tuple[UInt8[Tensor, "..."], ...]
    fps: float


@dataclass
class VlmPairBatch:
    """A batch of pairs of answers, encoded: the rejected sample may have media of its own.

    `media` gives the media of the chosen answers, decoded on access. Samples stay on the CPU until they are
    collated.
    """

    prompts: list[str]
    chosen: list[VlmSample]
    rejected: list[VlmSample]
    media: list[Callable[[], TimedMedia]]
    ids: list[str]
    epoch: int = 0
    margins: Float[Tensor, " batch"] | None = None
    """Margin of the chosen answer, NaN where it is unknown; None if no pair of the data has one."""
    aspects: list[str | None] | None = None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> VlmPairBatch:
        """Return the batch with its numbers on another device."""
        return replace(self, margins=None if self.margins is None else self.margins.to(device))
