"""Images and videos in the form that processors of vision-language models expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.vlm.families import Family


def to_uint8(media: Tensor) -> Tensor:
    """Return one image or video in the form that processors expect: levels of 0 to 255, on the CPU."""
    if media.ndim not in (3, 4) or media.shape[-3] != 3 or 0 in media.shape:
        raise PipelineError(f"media of shape {list(media.shape)}; images are [3, H, W] and videos [frames, 3, H, W].")
    if media.dtype == torch.uint8:
        return media.cpu()
    if not media.is_floating_point() or not (0 <= float(media.min()) and float(media.max()) <= 1):
        raise PipelineError(f"media of {media.dtype} from {media.min()} to {media.max()}; give floats in [0, 1].")
    return (media.detach().float() * 255).round().to(torch.uint8).cpu()


def split_media(media: Sequence[Tensor], family: Family) -> tuple[list[Tensor], list[Tensor]]:
    """Return the images and the videos among one sample's media.

    Raises:
        PipelineError: the family does not take them together.
    """
    images, videos = ([one for one in media if one.ndim == axes] for axes in (3, 4))
    if images and videos and not family.mixes_media:
        raise PipelineError("this model takes images or videos in one prompt, not both; split the sample.")
    lengths = [len(video) for video in videos]
    if len(set(lengths)) > 1 and not family.mixes_lengths:
        raise PipelineError(
            f"this model takes videos of equally many frames in one prompt, not of {' and '.join(map(str, lengths))};"
            " take the same number of each."
        )
    return images, videos


def video_arguments(videos: Sequence[Tensor], fps: float, least: int = 1) -> dict[str, Any]:
    """Return the metadata that tell a processor that all frames are given, and their times.

    The last frame of a video of fewer than `least` frames is repeated, at its own time.
    """
    from transformers.video_utils import VideoMetadata

    if not videos:
        return {}
    if not fps > 0:
        raise PipelineError(f"fps={fps}: frames per second must be positive.")
    indices = [[*range(len(video)), *[len(video) - 1] * (least - len(video))] for video in videos]
    metadata = [VideoMetadata(total_num_frames=len(own), fps=fps, frames_indices=own) for own in indices]
    shown = [video[own] for video, own in zip(videos, indices, strict=True)]
    return {"videos": shown, "video_metadata": metadata, "do_sample_frames": False}
