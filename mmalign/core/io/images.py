"""Images in and out: bytes or a file to an upright RGB image, to a tensor in [0, 1], and back to PNG bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image
from torch import Tensor

from mmalign.core.errors import LONGEST_PATH, UserError, shorten
from rewards.media import upright_rgb

Media = bytes | Path
"""An image as data sets hold it: the bytes of a PNG, JPEG or WebP file, or the path of one."""


def read_bytes(media: Media, name: str) -> bytes:
    """Return the encoded bytes of an image; `name` identifies its record in errors.

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(media, bytes):
        return media
    try:
        return media.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: image '{shorten(str(media), LONGEST_PATH)}' cannot be read ({reason})") from None


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return (width, height) of the upright image, from the file's header alone.

    Raises:
        UserError: the bytes are no image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(name, data, error) from None
    return (height, width) if turned else (width, height)


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to upright 8-bit RGB by the rule that rewards follow too, `rewards.media.upright_rgb`.

    Raises:
        UserError: the bytes are no image, a damaged one, or one of 32 bits a channel.
    """
    try:
        return upright_rgb(Image.open(io.BytesIO(data)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(name, data, error) from None


def _unreadable(name: str, data: bytes, error: Exception) -> UserError:
    # PIL prints the address of the buffer, which carries no information and changes from run to run.
    reason = " ".join(str(error).split("<_io")[0].split()) or type(error).__name__
    return UserError(f"{name}: unreadable image ({len(data)} bytes: {reason})")


def image_to_tensor(image: Image.Image) -> Float[Tensor, "channels height width"]:
    """Return an RGB image as float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def tensor_to_image(media: Float[Tensor, "channels height width"]) -> Image.Image:
    """Return a tensor in [0, 1] as an 8-bit image, rounded to the nearest level and clipped."""
    levels = media.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def encode_png(media: Float[Tensor, "channels height width"] | Image.Image) -> bytes:
    """Return PNG bytes; lossless, so that `image_to_tensor(open_image(...))` returns the same 8-bit levels."""
    image = media if isinstance(media, Image.Image) else tensor_to_image(media)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(media: Media, name: str = "image") -> Float[Tensor, "3 height width"]:
    """Return an encoded image (bytes or path) as a float32 tensor in [0, 1]; see `open_image` for the conversions."""
    return image_to_tensor(open_image(read_bytes(media, name), name))


def find_images(source: str | Path) -> Path:
    """Return the parquet of sampled images for a folder that `pairs sample` wrote, or for the file itself.

    Raises:
        UserError: there is none, or sampling was interrupted.
    """
    path = Path(source)
    if path.is_file():
        return path
    if (path / "parts").is_dir():  # also where more were being added to a finished file
        raise UserError(f"{path}: sampling is not finished; run the same `mmalign pairs sample` again to complete it")
    if (path / "images.parquet").is_file():
        return path / "images.parquet"
    raise UserError(f"{path}: holds no images.parquet; make it with `mmalign pairs sample MODEL --out {path}`")
