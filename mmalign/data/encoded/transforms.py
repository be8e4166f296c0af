"""Resize, crop and flip for preference pairs: one decision per pair, applied alike to both sides.

A pair compares two renderings of one prompt. A flip or crop drawn for each side on its own would teach the model the
augmentation instead of the preference, so all randomness is in a `Decision`, which is a function of the pair alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mmalign.core.hashing import uniform
from mmalign.core.io.images import image_to_tensor

WHOLE = 16
"""An image with more than this many times the pixels of its crop, once resized, is resized near the crop only."""


@dataclass(frozen=True)
class Decision:
    """Where to crop, as fractions of the free room in each direction (0 = left or top, 1 = right or bottom)."""

    across: float = 0.5
    down: float = 0.5


def decide_crop(crop: Literal["center", "random"], pair_id: str) -> Decision:
    """Return the crop of a pair; the same for both sides, in every run and on every machine."""
    if crop == "center":
        return Decision()
    return Decision(uniform("crop-across", pair_id), uniform("crop-down", pair_id))


def cover(size: tuple[int, int], target: tuple[int, int], decision: Decision) -> tuple[int, int, int, int]:
    """Return (width, height) of `size` resized to just cover `target`, both (w, h), and (left, top) of the crop."""
    scale = max(wanted / side for wanted, side in zip(target, size, strict=True))
    width, height = (max(wanted, round(side * scale)) for wanted, side in zip(target, size, strict=True))
    left = round(decision.across * (width - target[0]))
    top = round(decision.down * (height - target[1]))
    return width, height, left, top


@dataclass(frozen=True)
class VideoTransform:
    """Resize all frames to just cover height x width (bicubic, antialiased) and crop what is beyond."""

    height: int
    width: int
    crop: Literal["center", "random"] = "center"

    def decide(self, pair_id: str) -> Decision:
        """Return the crop of a pair, as `PairTransform.decide`."""
        return decide_crop(self.crop, pair_id)

    def __call__(
        self, levels: UInt8[Tensor, "frames 3 h w"], decision: Decision
    ) -> UInt8[Tensor, "frames 3 height width"]:
        """Return the frames as 8-bit levels; untouched where the size is right already."""
        size = levels.shape[-1], levels.shape[-2]
        width, height, left, top = cover(size, (self.width, self.height), decision)
        if size != (width, height):
            resized = F.interpolate(levels.float(), (height, width), mode="bicubic", antialias=True)
            levels = resized.round_().clamp_(0, 255).to(torch.uint8)
        return levels[..., top : top + self.height, left : left + self.width].contiguous()


@dataclass(frozen=True)
class PairTransform:
    """Resize the shorter side to `resolution` (bicubic, antialiased) and crop a square from the longer one."""

    resolution: int
    crop: Literal["center", "random"] = "center"

    def decide(self, pair_id: str) -> Decision:
        """Return the crop of a pair; the same for both sides, in every run and on every machine."""
        return decide_crop(self.crop, pair_id)

    def plan(self, size: tuple[int, int], decision: Decision) -> tuple[int, int, int, int]:
        """Return (width, height) after resizing and the (left, top) of the crop, for an image of `size` (w, h).

        The decision changes nothing else in the result, so a cache key holds these numbers besides the image.
        """
        return cover(size, (self.resolution, self.resolution), decision)

    def __call__(
        self, image: Image.Image, decision: Decision, *, flip: bool = False
    ) -> Float[Tensor, "3 resolution resolution"]:
        """Return the transformed image in [0, 1]; `flip` mirrors it from left to right after cropping."""
        width, height, left, top = self.plan(image.size, decision)
        if width * height > WHOLE * self.resolution**2:
            return self._finish(self._strip(image, (width, height), (left, top)), flip)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if (width, height) != (self.resolution, self.resolution):
            image = image.crop((left, top, left + self.resolution, top + self.resolution))
        return self._finish(image, flip)

    def _strip(self, image: Image.Image, size: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
        """Return the crop of a long strip, of which only the part near the crop is resized."""
        side = self.resolution
        scale = side / min(image.size)
        margin = math.ceil(2 * max(scale, 1)) + 1  # what the bicubic filter reaches beyond the crop, in new pixels
        starts = [max(0, start - margin) for start in corner]
        ends = [min(length, start + side + margin) for length, start in zip(size, corner, strict=True)]
        ratios = [old / new for old, new in zip(image.size, size, strict=True)]
        left, top = (start * ratio for start, ratio in zip(starts, ratios, strict=True))
        right, bottom = (min(end * r, old) for end, r, old in zip(ends, ratios, image.size, strict=True))
        part = (ends[0] - starts[0], ends[1] - starts[1])
        image = image.resize(part, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        across, down = corner[0] - starts[0], corner[1] - starts[1]
        return image.crop((across, down, across + side, down + side))

    @staticmethod
    def _finish(image: Image.Image, flip: bool) -> Tensor:
        tensor = image_to_tensor(image)
        return tensor.flip(-1).contiguous() if flip else tensor
