"""Differences between families of vision-language models: classes, positions, and the number of features of media.

The count of features is worked out from the pixels and the configuration, without the vision tower and apart from the
processor that wrote the placeholders, so that each checks the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.vlm.positions import Grid

Vision = Mapping[str, Tensor]
"""A processor's output for one sample's media: pixels, grids and sizes, by the names of the model's arguments."""


@dataclass(frozen=True)
class Family:
    """One family, by the `model_type` of its configuration.

    model_class: in transformers. count: the features of images and those of videos that media make. language: where
    the language model sits, which alone is adapted. grids: those of images and of videos, for models with positions
    on three axes. mixes_media: whether one sample may hold images and videos. mixes_lengths: whether it may hold
    videos of different numbers of frames. axis: along which the pixels of several samples are joined.
    """

    model_class: str
    count: Callable[[Vision, Any], tuple[int, int]]
    language: str = "model.language_model"
    grids: Callable[[Vision, Any], tuple[list[Grid], list[Grid]]] | None = None
    mixes_media: bool = True
    mixes_lengths: bool = False
    axis: int = 0


def signature(vision: Vision, axis: int) -> tuple[Any, ...]:
    """Return the values that must be equal for joining two samples' pixels: names, and shapes off the joining axis."""
    return tuple((name, *value.shape[:axis], *value.shape[axis + 1 :]) for name, value in sorted(vision.items()))


def join(visions: Sequence[Vision], axis: int) -> dict[str, Tensor]:
    """Join the pixels of samples of one `signature`, in order."""
    return {name: torch.cat([vision[name] for vision in visions], dim=axis) for name in visions[0]}


def _grids(vision: Vision, config: Any) -> tuple[list[Grid], list[Grid]]:
    """Qwen2-VL: every grid of patches shrinks by the merge size on both sides; the frames are one step apart."""
    images, videos = _sizes(vision, "image_grid_thw", config), _sizes(vision, "video_grid_thw", config)
    return [Grid(tuple(range(t)), h, w) for t, h, w in images], [Grid(tuple(range(t)), h, w) for t, h, w in videos]


def _grids_in_time(vision: Vision, config: Any) -> tuple[list[Grid], list[Grid]]:
    """Qwen2.5-VL: as Qwen2-VL, with the frames of videos at their times, in units of 1 / tokens_per_second."""
    images, videos = _grids(vision, config)
    if not videos:
        return images, videos
    # Rounded in single precision, as in transformers before 5.3.
    steps = [
        seconds * config.vision_config.tokens_per_second for seconds in vision["second_per_grid_ts"].cpu().float()
    ]
    timed = [(torch.arange(len(one.times)) * step).long().tolist() for one, step in zip(videos, steps, strict=True)]
    return images, [one._replace(times=tuple(times)) for one, times in zip(videos, timed, strict=True)]


def _grids_of_frames(vision: Vision, config: Any) -> tuple[list[Grid], list[Grid]]:
    """Qwen3-VL: as Qwen2-VL, with a grid for every frame of a video, because text stands between the frames."""
    images, videos = _grids(vision, config)
    return images, [one._replace(times=(0,)) for one in videos for _ in one.times]


def _sizes(vision: Vision, name: str, config: Any) -> list[tuple[int, int, int]]:
    """Return frames, rows and columns of the features of each image or video."""
    merge, grids = config.vision_config.spatial_merge_size, vision.get(name)
    return [] if grids is None else [(t, h // merge, w // merge) for t, h, w in grids.tolist()]


def _grid_features(vision: Vision, config: Any) -> tuple[int, int]:
    """Qwen: a feature for every place of a grid."""
    images, videos = _grids(vision, config)
    return sum(one.features for one in images), sum(one.features for one in videos)


def _squares(tiles: Tensor, patch: int, shrink: float) -> int:
    """Features of equal images `[..., 3, H, W]` whose grid of patches shrinks on both sides."""
    height, width = tiles.shape[-2:]
    return math.prod(tiles.shape[:-3]) * round((height // patch) * (width // patch) * shrink**2)


def _smolvlm(vision: Vision, config: Any) -> tuple[int, int]:
    """SmolVLM: tiles and frames are images alike, their grids shrunk by the pixel shuffle."""
    tiles = vision.get("pixel_values")
    return (0 if tiles is None else _squares(tiles, config.vision_config.patch_size, 1 / config.scale_factor)), 0


def _internvl(vision: Vision, config: Any) -> tuple[int, int]:
    """InternVL: as SmolVLM, with the patch given by its two sides."""
    tiles = vision.get("pixel_values")
    return (0 if tiles is None else _squares(tiles, config.vision_config.patch_size[0], config.downsample_ratio)), 0


def _llava_onevision(vision: Vision, config: Any) -> tuple[int, int]:
    """LLaVA-OneVision: tiles and a newline a row; several images untiled; frames halved, with a newline a video."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    images = videos = 0
    if "image_sizes" in vision:
        limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        tiled = len(vision["image_sizes"]) == 1
        sizes = vision["image_sizes"].tolist()
        images = sum(_tiled(size, config, side, limit) if tiled else side**2 + 1 for size in sizes)
    if "pixel_values_videos" in vision:
        count, frames = vision["pixel_values_videos"].shape[:2]
        videos = count * (frames * math.ceil(side / 2) ** 2 + 1)
    return images, videos


def _llava_next_video(vision: Vision, config: Any) -> tuple[int, int]:
    """LLaVA-NeXT-Video: tiles and a newline a row; frames halved on both sides."""
    patch = config.vision_config.patch_size
    side = config.vision_config.image_size // patch
    images = videos = 0
    if "image_sizes" in vision:
        images = sum(_tiled(size, config, side) for size in vision["image_sizes"].tolist())
    if "pixel_values_videos" in vision:
        count, frames, _, height, width = vision["pixel_values_videos"].shape
        videos = count * frames * (height // patch // 2) * (width // patch // 2)
    return images, videos


def _tiled(size: Sequence[int], config: Any, side: int, limit: int | None = None) -> int:
    """Features of an image of that height and width cut into tiles: rows, a newline each, and the whole once more.

    The image fills a canvas of the best-fitting proportions, with `side` patches along each tile; patches outside of
    it are cut away, and beyond `limit` tiles the rest is shrunk.
    """
    from transformers.image_processing_utils import select_best_resolution

    tile = config.vision_config.image_size
    best = select_best_resolution((size[0], size[1]), config.image_grid_pinpoints)
    rows, columns = (side * (length // tile) for length in best)
    height, width = size
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    ratio = 0.0 if limit is None else math.sqrt(rows * columns / (limit * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return rows * columns + rows + side**2


FAMILIES: dict[str, Family] = {
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", _llava_onevision),
    "llava_next_video": Family("LlavaNextVideoForConditionalGeneration", _llava_next_video),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", _grid_features, grids=_grids, mixes_lengths=True),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration", _grid_features, grids=_grids_in_time, mixes_lengths=True
    ),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", _grid_features, grids=_grids_of_frames, mixes_lengths=True),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration", _smolvlm, language="model.text_model", mixes_media=False, axis=1
    ),
    "internvl": Family("InternVLForConditionalGeneration", _internvl),
}
"""model_type -> family."""
