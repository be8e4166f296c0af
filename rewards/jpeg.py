"""JPEG compressibility of an image: the rewards of DDPO, and a differentiable one similar to DRaFT's.

* `bytes`     the size of the file that Pillow writes, in kilobytes of 1000 bytes (Black et al. 2023). It depends on
  the image's size and a little on Pillow's libjpeg, so that Pillow's version is part of this reward's.
* `distance`  the loss by compression: the root mean square difference, in 8-bit steps, between an image and its
  JPEG with the rounding of the coefficients made differentiable: round(x) + (x - round(x))^3 (Shin and Song 2017).
  With straight-through rounding the lost part would have no gradient.

Deviations from DRaFT (Clark et al. 2023), whose code is not published: it takes the Euclidean distance, which grows
with the image's size, and the quality 50 is ours by memory of its appendix (UNVERIFIED). Values inside the decoder are
not rounded to 8 bits. Flow-GRPO divides the size by 500 kB instead of 1 kB: `unit=500_000`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import PIL
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rewards.base import Reward
from rewards.errors import RewardError, choices
from rewards.media import pil_images

QUALITY = {"bytes": 95, "distance": 50}
SUBSAMPLINGS = {"4:2:0": 2, "4:4:4": 0}

# Annex K of the JPEG standard: luminance, chrominance.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *[(99,) * 8] * 4,
)  # fmt: skip
_TO_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)


class JpegIncompressibility(Reward):
    """Size of an image as JPEG, in kilobytes of 1000 bytes: higher for detail and noise.

    form: `bytes` (default) or the differentiable `distance`, see above. quality: 1 to 95, by default 95 (distance:
    50). subsampling: of the colour planes, `4:2:0` (default) or `4:4:4`. unit: `bytes` alone; bytes that count as 1.
    """

    name: ClassVar[str] = "jpeg-incompressibility"
    version = f"bytes at quality 95, 4:2:0, Pillow {PIL.__version__}"
    range = (0.0, math.inf)
    licence = "Apache-2.0"
    source = "none: computed, by Pillow"
    citation = "Black et al. 2023, arXiv:2305.13301; distance: Clark et al. 2023, arXiv:2309.17400"
    sign: ClassVar[int] = 1

    def __init__(
        self,
        *,
        form: str = "bytes",
        quality: int | None = None,
        subsampling: str = "4:2:0",
        unit: float = 1000.0,
        **common: Any,
    ) -> None:
        """Check the options and set the facts that follow from them."""
        super().__init__(**common)
        if form not in QUALITY:
            raise RewardError(f"{self.name}: form {form!r} is unknown; {choices(form, QUALITY)}")
        if subsampling not in SUBSAMPLINGS:
            raise RewardError(
                f"{self.name}: subsampling {subsampling!r} is unknown; {choices(subsampling, SUBSAMPLINGS)}"
            )
        quality = QUALITY[form] if quality is None else quality
        if not 1 <= quality <= 95:
            raise RewardError(f"{self.name}: quality is {quality}; 1 to 95 are allowed")
        if unit <= 0 or (form == "distance" and unit != 1000):
            raise RewardError(f"{self.name}: unit is {unit:g}; a positive number is allowed, only with form='bytes'")
        self.form, self.quality, self.subsampling, self.unit = form, quality, subsampling, unit
        self.differentiable = form == "distance"
        said = f"{form} at quality {quality}, {subsampling}"
        if form == "bytes":
            said += f", Pillow {PIL.__version__}" + (f", in {unit:g} bytes" if unit != 1000 else "")
        self.version = said
        ends = (0.0, 255.0 * self.sign if form == "distance" else math.inf * self.sign)
        self.range = (min(ends), max(ends))

    def score(
        self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
    ) -> Float[Tensor, " batch"]:
        """Compress each image."""
        if self.form == "distance":
            pixels = media.clamp(0, 1) * 255
            lost = pixels - jpeg_round_trip(pixels, self.quality, self.subsampling, round_smoothly)
            squares = lost.square().flatten(1).mean(1)
            # Where nothing is lost, the gradient is set to 0 instead of infinity.
            found = torch.where(squares > 0, squares.where(squares > 0, 1.0).sqrt(), squares)
        else:
            with ThreadPoolExecutor(max_workers=8) as pool:
                sizes = list(pool.map(self._size, pil_images(media)))
            found = torch.tensor(sizes, dtype=torch.float64, device=media.device) / self.unit
        return self.sign * found

    def _size(self, image: Image.Image) -> int:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality, subsampling=SUBSAMPLINGS[self.subsampling])
        return buffer.tell()


class JpegCompressibility(JpegIncompressibility):
    """Size of an image as JPEG, in kilobytes of 1000 bytes, negated: higher for smooth images.

    Options as of `jpeg-incompressibility`.
    """

    name: ClassVar[str] = "jpeg-compressibility"
    range = (-math.inf, 0.0)
    sign: ClassVar[int] = -1


def round_smoothly(values: Tensor) -> Tensor:
    """Round up to the cube of the remainder: within 1/8 of the integer, with gradient 0 only at integers."""
    whole = values.detach().round()
    return whole + (values - whole) ** 3


def jpeg_round_trip(
    pixels: Float[Tensor, "batch 3 height width"],
    quality: int,
    subsampling: str = "4:2:0",
    rounding: Callable[[Tensor], Tensor] = torch.round,
) -> Float[Tensor, "batch 3 height width"]:
    """Compress and decompress pixels in [0, 255] as libjpeg does, but for its rounding of intermediate values.

    Edges are repeated up to whole blocks, colour planes averaged over 2 x 2 pixels and interpolated back.
    """
    height, width = pixels.shape[-2:]
    matrix = pixels.new_tensor(_TO_YCBCR)
    whole = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    planes = torch.einsum("pc,bchw->bphw", matrix, whole)
    luminance, chrominance = planes[:, :1] - 128, planes[:, 1:]
    luminance = _quantised(luminance, _LUMINANCE, quality, rounding)
    if subsampling == "4:2:0":
        chrominance = _quantised(F.avg_pool2d(chrominance, 2), _CHROMINANCE, quality, rounding)
        chrominance = F.interpolate(chrominance, scale_factor=2, mode="bilinear", align_corners=False)
    else:
        chrominance = _quantised(chrominance, _CHROMINANCE, quality, rounding)
    planes = torch.cat([luminance + 128, chrominance], dim=1)
    decoded = torch.einsum("cp,bphw->bchw", torch.linalg.inv(matrix.double()).to(matrix), planes)
    return decoded[..., :height, :width].clamp(0, 255)


def _quantised(
    planes: Tensor, table: Sequence[Sequence[int]], quality: int, rounding: Callable[[Tensor], Tensor]
) -> Tensor:
    """Round the cosine transform of every 8 x 8 block to the steps of a table."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = ((planes.new_tensor(table) * scale + 50) / 100).floor().clamp(1, 255)
    cosines = _cosines(planes)
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    levels = rounding(cosines @ blocks @ cosines.T / steps)
    blocks = cosines.T @ (levels * steps) @ cosines
    return blocks.transpose(3, 4).flatten(4).flatten(2, 3)


def _cosines(like: Tensor) -> Tensor:
    """Return the orthonormal cosine transform `[8, 8]` in the dtype and on the device of another tensor."""
    place = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * place[None] + 1) * place[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
