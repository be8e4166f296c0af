"""Images embedded in the page: small ones unchanged, large ones as thumbnails, up to a limit for browsers."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, features
from torch import Tensor

from rewards.combining.on_frames import evenly

MAX_SIDE = 256
"""Images up to this many pixels are embedded unchanged; larger ones are shrunk to this size."""
MAX_IMAGES = 2400
"""Above this number of images, only some of the prompts are shown, evenly spaced and never chosen by score."""
PIXEL_ART_SIDE = 128
"""Images up to this size are magnified without smoothing."""
_GAP = 2


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data URI; `shrunk` if it is not the original, `pixelated` if it is magnified without smoothing."""

    uri: str
    width: int
    height: int
    shrunk: bool
    pixelated: bool


def embed(path: Path) -> Thumbnail:
    """Return an image file as a data URI."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        mime = f"image/{(image.format or 'png').lower()}"
        if max(width, height) > MAX_SIDE:
            data, mime = _shrink(image)
    uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    large = max(width, height)
    return Thumbnail(uri, width, height, shrunk=large > MAX_SIDE, pixelated=large <= PIXEL_ART_SIDE)


def frame_strip(video: UInt8[Tensor, "frames 3 height width"], frames: int, side: int) -> Thumbnail:
    """Return up to `frames` frames of a video, evenly spaced, side by side; those larger than `side` shrunk to it."""
    images = []
    for index in evenly(len(video), frames):
        image = Image.fromarray(video[index].permute(1, 2, 0).numpy())
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        images.append(image)
    width, height = images[0].size
    whole = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, height), "white")
    for number, image in enumerate(images):
        whole.paste(image, (number * (width + _GAP), 0))
    small = max(video.shape[-2:]) <= PIXEL_ART_SIDE
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    whole.save(buffer, format=kind, **({} if small else {"quality": 82}))
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, *whole.size, shrunk=(width, height) != (video.shape[-1], video.shape[-2]), pixelated=small)


def choose_prompts(prompts: int, images_per_prompt: int, most: int = MAX_IMAGES) -> list[int]:
    """Return the prompts whose images are embedded: all, or as many evenly spaced ones as the limit allows."""
    room = max(1, most // images_per_prompt)
    if prompts <= room:
        return list(range(prompts))
    return np.linspace(0, prompts - 1, room).round().astype(int).tolist()


def _shrink(image: Image.Image) -> tuple[bytes, str]:
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    small.save(buffer, format=kind, quality=82)
    return buffer.getvalue(), f"image/{kind}"
