"""Resize, crop or pad, and normalise media for an image tower: one geometry with two implementations.

* `reference`: through PIL on 8-bit pixels, as the original CLIP, HPSv2, ... code does; not differentiable;
* `differentiable`: on tensors, antialiased bicubic, clamped to [0, 1], rounded to 1/255 straight-through.

They differ in how intermediate results are rounded: by 0.02-0.16 of one 8-bit step on average and by at most 10 steps
at hard edges, on photographs and screenshots. Without the clamp it would be up to 24 steps, without antialiasing 80.
Geometry: `shortest` resizes the shorter edge and crops the centre, the longer edge truncated as torchvision does;
`longest` resizes the longer edge and pads the rest (HPSv2); `squash` ignores the aspect ratio. With `resize_to` the
resize aims at a larger size, of which the centre is cropped (ALIGN, DINOv2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rewards.errors import RewardError, choices

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

MODES = ("differentiable", "reference")
RESIZES = ("longest", "shortest", "squash")
_PIL_NUMBER = {2: "bilinear", 3: "bicubic"}
_PIL_FILTER = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def round_straight_through(media: Tensor) -> Tensor:
    """Round to multiples of 1/255, with the gradient of the identity."""
    return media + ((media * 255).round() / 255 - media).detach()


@dataclass(frozen=True)
class Preprocess:
    """Media `[B, 3, H, W]` in [0, 1] -> normalised `[B, 3, *size]`.

    `size` is (height, width) or one number; `fill` the padding of `longest`, in [0, 1]; `rounding=False` leaves out
    the straight-through rounding of the differentiable mode, which makes the map continuous; `resize_to` is what the
    resize aims at, where that is not `size`.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = OPENAI[0]
    std: tuple[float, ...] = OPENAI[1]
    resize: str = "shortest"
    interpolation: str = "bicubic"
    fill: float = 0.0
    rounding: bool = True
    resize_to: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse unknown resizes and interpolations."""
        if self.resize not in RESIZES:
            raise RewardError(f"resize {self.resize!r} is unknown; {choices(self.resize, RESIZES)}")
        if self.interpolation not in _PIL_FILTER:
            raise RewardError(
                f"interpolation {self.interpolation!r} is unknown; {choices(self.interpolation, _PIL_FILTER)}"
            )

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read open_clip's `preprocess_cfg` (size, mean, std, interpolation, resize_mode, fill_color 0-255)."""
        size = config["size"]
        return cls(
            size=size if isinstance(size, int) else (size[0], size[-1]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize=config["resize_mode"],
            # open_clip evaluates with bicubic where training drew the filter at random
            interpolation="bicubic" if config["interpolation"] == "random" else config["interpolation"],
            fill=config["fill_color"] / 255,
        )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read a `preprocessor_config.json` of transformers (CLIP, SigLIP, ALIGN, ViT, DINOv2), new or old.

        Raises:
            RewardError: it uses an unsupported option: another filter, no resizing, or normalising twice.
        """
        if lacking := [key for key in ("size", "image_mean", "image_std") if key not in config]:
            raise RewardError(f"the image processor's configuration lacks {', '.join(lacking)}")
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
        size = config["size"]
        shortest = "shortest_edge" in size if isinstance(size, Mapping) else kind.startswith("CLIP")
        resized = _size_of(size)
        # Old files leave out the defaults of their class.
        cropped = config.get("do_center_crop", kind.startswith("CLIP"))
        resample = config.get("resample", 3 if kind.startswith("CLIP") else None)
        if resample not in _PIL_NUMBER or not config.get("do_resize", True) or config.get("include_top", False):
            raise RewardError(f"{kind} with resample={resample}: only resizing by {_PIL_NUMBER} is supported")
        if shortest and not cropped:
            raise RewardError(
                f"{kind} resizes the shorter edge without a crop, which gives no fixed size; a crop is needed"
            )
        # The pixels of transformers run from 0 to 255: v = 255 * factor * x - offset, then (v - mean) / std.
        factor = 255 * config.get("rescale_factor", 1 / 255)
        offset = float(config.get("rescale_offset", False))
        normalised = config.get("do_normalize", True)
        mean = config["image_mean"] if normalised else (0.0, 0.0, 0.0)
        std = config["image_std"] if normalised else (1.0, 1.0, 1.0)
        return cls(
            size=_size_of(config["crop_size"]) if cropped else resized,
            mean=tuple((value + offset) / factor for value in mean),
            std=tuple(value / factor for value in std),
            resize="shortest" if shortest else "squash",
            interpolation=_PIL_NUMBER[resample],
            resize_to=resized,
        )

    @property
    def target(self) -> tuple[int, int]:
        """Height and width of the result."""
        return _pair(self.size)

    def __call__(
        self, media: Float[Tensor, "batch 3 height width"], mode: str = "differentiable"
    ) -> Float[Tensor, "batch 3 out_height out_width"]:
        """Preprocess in one of `MODES`; `reference` has no gradient and refuses a tensor that requires one."""
        if mode not in MODES:
            raise RewardError(f"preprocessing {mode!r} is unknown; {choices(mode, MODES)}")
        media = self._near_crop(media)
        if mode == "reference":
            if media.requires_grad and torch.is_grad_enabled():
                raise RewardError("preprocessing='reference' has no gradient; use preprocessing='differentiable'")
            return self._normalise(torch.stack([self._reference(item) for item in media]))
        return self._normalise(self._differentiable(media))

    def _near_crop(self, media: Tensor) -> Tensor:
        """Cut a long strip to the part near the central crop, which would otherwise be resized whole in vain.

        The part is six times as long as the target; bicubic filters reach no further. The centre stays where it is.
        """
        if self.resize != "shortest":
            return media
        size, resized = media.shape[-2:], self._resized_size(*media.shape[-2:])
        for axis, (length, new, target) in enumerate(zip(size, resized, self.target, strict=True)):
            if new > 8 * target:
                cut = (length - math.ceil(length * 6 * target / new)) // 2
                media = media.narrow(axis - 2, cut, length - 2 * cut)
        return media

    def _normalise(self, media: Tensor) -> Tensor:
        mean, std = (media.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (media - mean) / std

    def _differentiable(self, media: Tensor) -> Tensor:
        resized = self._resized_size(*media.shape[-2:])
        if resized != tuple(media.shape[-2:]):
            media = F.interpolate(media, size=resized, mode=self.interpolation, antialias=True, align_corners=False)
        media = media.clamp(0, 1)
        return self._fit(round_straight_through(media) if self.rounding else media)

    def _reference(self, image: Tensor) -> Tensor:
        height, width = self._resized_size(*image.shape[-2:])
        pixels = (image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        resized = Image.fromarray(pixels).resize((width, height), _PIL_FILTER[self.interpolation])
        result = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(image.dtype) / 255
        return self._fit(result.to(image.device))

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        target_height, target_width = _pair(self.resize_to or self.size)
        if self.resize == "squash":
            return target_height, target_width
        if self.resize == "shortest" and target_height == target_width:
            if height <= width:
                return target_height, int(target_height * width / height)
            return int(target_height * height / width), target_height
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.resize == "longest" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _fit(self, media: Tensor) -> Tensor:
        """Pad or crop each side to the target, about the centre."""
        (height, width), (target_height, target_width) = media.shape[-2:], self.target
        down, across = max(target_height - height, 0), max(target_width - width, 0)
        if down or across:
            edges = (across // 2, across - across // 2, down // 2, down - down // 2)
            media = F.pad(media, edges, value=self.fill)
            height, width = media.shape[-2:]
        top, left = round((height - target_height) / 2), round((width - target_width) / 2)
        return media[..., top : top + target_height, left : left + target_width]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _size_of(size: int | Mapping[str, int]) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return size["height"] if size["height"] == size["width"] else (size["height"], size["width"])
