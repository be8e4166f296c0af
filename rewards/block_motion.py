"""How much moves in a video, without weights: block matching in the place of VBench's optical flow.

Frames are made grey, resized so that the shorter edge has 128 pixels, and brought to mean 0 and deviation 1, which
takes out flicker of the whole picture. Each block of 16 x 16 is looked for in the
next frame, up to 8 pixels away along both axes (full search, mean absolute difference; see Jain and Jain 1981,
"Displacement Measurement and Its Application in Interframe Image Coding", IEEE Trans. Communications 29). A block has
moved if its best place halves the difference that it has where it stands: flat blocks and noise do not move.
As VBench's dynamic degree does (`rewards.video_motion`), each pair of frames counts by the fastest 5 % of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rewards.base import Reward
from rewards.errors import RewardError

SIDE, BLOCK, REACH = 128, 16, 8
FASTEST = 0.05
UNIT = 256 / SIDE
"""Lengths are those in a frame whose shorter edge has 256 pixels, as in VBench."""
TIE = 1e-4
"""Added to the difference a pixel of distance: of equal places the nearest counts."""
FLAT = 0.01
"""The smallest deviation of a frame that is taken for contrast."""


class BlockMotion(Reward):
    """How far the fastest blocks of a video move, in pixels a frame at 256 pixels a side, by block matching.

    0 is a still. Steps of less than half a pixel of the resized frame read as none, none is longer than 22.6, and in
    noisy frames less is found. It needs no weights; `vbench-dynamic-degree` asks a similar question of RAFT and says
    yes or no.
    """

    name: ClassVar[str] = "block-motion"
    modality = "video"
    range = (0.0, UNIT * REACH * math.sqrt(2))
    licence = "Apache-2.0"
    least_frames = 2

    def score(
        self,
        media: Float[Tensor, "batch frames 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Average the motion of neighbouring frames."""
        if media.shape[1] < self.least_frames:
            raise RewardError("block-motion: a video of 1 frame; at least 2 are needed")
        grey = _standardised(_small(media.mean(2)))
        lengths = torch.stack([block_lengths(video[:-1], video[1:]) for video in grey])
        count = max(1, round(lengths.shape[-1] * FASTEST))
        return UNIT * lengths.topk(count, dim=-1).values.mean((1, 2))


def block_lengths(
    first: Float[Tensor, "pairs height width"], second: Float[Tensor, "pairs height width"]
) -> Float[Tensor, "pairs blocks"]:
    """Return how far each block of the first frames has moved in the second, in pixels."""
    height, width = first.shape[-2:]
    padded = F.pad(second[:, None], (REACH,) * 4, mode="replicate")[:, 0]
    shifts = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    shifts.sort(key=lambda shift: math.hypot(*shift))  # the first is none at all
    best = still = first.new_zeros(0)
    lengths = first.new_zeros(0)
    for y, x in shifts:
        moved = padded[:, REACH + y : REACH + y + height, REACH + x : REACH + x + width]
        cost = F.avg_pool2d((moved - first).abs()[:, None], BLOCK).flatten(1)
        if not (y or x):
            best, still, lengths = cost, cost, torch.zeros_like(cost)
            continue
        distance = math.hypot(y, x)
        nearer = cost + TIE * distance < best + TIE * lengths
        best, lengths = torch.where(nearer, cost, best), torch.where(nearer, distance, lengths)
    return torch.where(best <= still / 2, lengths, 0.0)


def _standardised(grey: Float[Tensor, "batch frames height width"]) -> Float[Tensor, "batch frames height width"]:
    mean, deviation = grey.mean((2, 3), keepdim=True), grey.std((2, 3), keepdim=True)
    return (grey - mean) / deviation.clamp(min=FLAT)


def _small(grey: Float[Tensor, "batch frames height width"]) -> Float[Tensor, "batch frames h w"]:
    scale = SIDE / min(grey.shape[-2:])
    target = [max(BLOCK, round(one * scale)) for one in grey.shape[-2:]]
    if target == list(grey.shape[-2:]):
        return grey
    return F.interpolate(grey, target, mode="bilinear", antialias=True, align_corners=False)
