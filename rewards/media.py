"""Read media into tensors in [0, 1], and group them by size.

Accepted, and checked: one float tensor `[B, 3, H, W]` (images) or `[B, F, 3, H, W]` (videos), or a sequence that mixes
such tensors without the batch dimension, PIL images of at most 16 bits a channel (see `upright_rgb`) and paths of
image files. Anything else raises `RewardError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from rewards.errors import RewardError

MediaItem = Tensor | Image.Image | str | PathLike[str]
Media = Tensor | Sequence[MediaItem]

SHAPES = {"image": "[B, 3, H, W]", "video": "[B, F, 3, H, W]"}
TOLERANCE = 1e-4  # tolerance for values outside [0, 1] after resampling in float32


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB: EXIF orientation applied, transparency laid over white, 16 bits scaled to 8.

    Training data and rewards use the same rule. It deviates from CLIP's original preprocessing, which drops the alpha
    channel and so scores the invisible colours of transparent pixels. An image in this form is returned itself.

    Raises:
        ValueError: the image has 32 bits per channel, for which white is not defined. OSError: it is damaged.
    """
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32 bits per channel, mode {image.mode}; save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(source: Image.Image | str | PathLike[str]) -> Float[Tensor, "3 height width"]:
    """Return a PIL image or an image file as float32 in [0, 1], by `upright_rgb`; 8 bits a channel survive exactly."""
    return read_levels(source).float().div_(255)


def read_levels(source: Image.Image | str | PathLike[str]) -> UInt8[Tensor, "3 height width"]:
    """Return the 8-bit levels of a PIL image or an image file, or raise `RewardError` with the reason."""
    name = "the PIL image" if isinstance(source, Image.Image) else str(source)
    try:
        if isinstance(source, Image.Image):
            return image_levels(source)
        if not Path(source).is_file():
            raise RewardError(f"no such image file: {source}")
        with Image.open(source) as image:
            return image_levels(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"cannot read {name} as an image: {error}") from error


def image_levels(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Return the 8-bit levels of a PIL image, by `upright_rgb`: a quarter of what the floats take."""
    return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)


def pil_images(media: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Return images in [0, 1] as 8-bit RGB images of PIL."""
    pixels = (media.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(item) for item in pixels]


def check_tensor(media: Tensor, modality: str, name: str = "media") -> None:
    """Raise `RewardError` unless the tensor has the modality's shape, a float dtype and values in [0, 1]."""
    shape, expected = list(media.shape), SHAPES[modality]
    rank = expected.count(",") + 1
    if media.dim() != rank:
        fix = "; add the batch dimension with unsqueeze(0)" if media.dim() == rank - 1 else ""
        raise RewardError(f"{name} has shape {shape}, but this reward scores {modality}s {expected}{fix}")
    if media.shape[-3] != 3:
        fix = "; channels come before height and width: movedim(-1, -3)" if media.shape[-1] == 3 else ""
        raise RewardError(f"{name} has shape {shape}: {expected} with 3 channels is expected{fix}")
    if media.numel() == 0:
        raise RewardError(f"{name} is empty: shape {shape}")
    if not media.is_floating_point():
        raise RewardError(f"{name} has dtype {media.dtype}; floats in [0, 1] are expected: media.float() / 255")
    low, high = (value.item() for value in media.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also true of NaN
        fix = " (in [-1, 1]? then media / 2 + 0.5)" if -1 - TOLERANCE <= low < 0 and high <= 1 + TOLERANCE else ""
        raise RewardError(f"{name} has values from {low:.4g} to {high:.4g}; [0, 1] is expected{fix}")


def read_media(media: Any, modality: str, name: str = "media") -> list[tuple[list[int], Tensor]]:
    """Return `(positions, tensor)` groups of equal size; together the positions are 0 .. B-1, each once."""
    if isinstance(media, Tensor):
        check_tensor(media, modality, name)
        return [(list(range(len(media))), media)]
    if isinstance(media, (str, PathLike, Image.Image)) or not isinstance(media, Sequence):
        raise RewardError(f"{name} is a {type(media).__name__}; give a tensor {SHAPES[modality]} or a list of items")
    if not media:
        raise RewardError(f"{name} is empty")
    groups: dict[tuple, tuple[list[int], list[Tensor]]] = {}
    for position, item in enumerate(media):
        # Images stay bytes until they are stacked, a quarter of the size of floats.
        tensor = _read_item(item, modality, f"{name}[{position}]")
        positions, tensors = groups.setdefault((tensor.shape, tensor.dtype, tensor.device), ([], []))
        positions.append(position)
        tensors.append(tensor)
    return [(positions, _as_floats(torch.stack(tensors))) for positions, tensors in groups.values()]


def _as_floats(media: Tensor) -> Tensor:
    return media.float().div_(255) if media.dtype == torch.uint8 else media


def _read_item(item: Any, modality: str, name: str) -> Tensor:
    if isinstance(item, Tensor):
        check_tensor(item.unsqueeze(0), modality, name)
        return item
    if modality != "image":
        raise RewardError(f"{name} is a {type(item).__name__}; {modality}s are given as tensors [F, 3, H, W]")
    if isinstance(item, (Image.Image, str, PathLike)):
        return read_levels(item)
    raise RewardError(f"{name} is a {type(item).__name__}; allowed: tensor, PIL image, path")
