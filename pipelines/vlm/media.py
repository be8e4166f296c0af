"""Images and videos in the form that processors of vision-language models expect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.errors import PipelineError


def to_uint8(media: Tensor) -> Tensor:
    """Return one image or video in the form that processors expect: levels of 0 to 255, on the CPU."""
    if media.ndim not in (3, 4) or media.shape[-3] != 3 or 0 in media.shape:
        raise PipelineError(f"media of shape {list(media.shape)}; images are [3, H, W] and videos [frames, 3, H, W].")
    if media.dtype == torch.uint8:
        return media.cpu()
    if not media.is_floating_point() or not (0 <= float(media.min()) and float(media.max()) <= 1):
        raise PipelineError(f"media of {media.dtype} from {media.min()} to {media.max()}; give floats in [0, 1].")
    return (media.detach().float() * 255).round().to(torch.uint8).cpu()


def video_arguments(videos: list[Tensor], fps: float) -> dict[str, Any]:
    """Return the metadata that tell a processor that all frames are given, and their times."""
    from transformers.video_utils import VideoMetadata

    if not videos:
        return {}
    if not fps > 0:
        raise PipelineError(f"fps={fps}: frames per second must be positive.")
    metadata = [
        VideoMetadata(total_num_frames=len(video), fps=fps, frames_indices=list(range(len(video)))) for video in videos
    ]
    return {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
