"""Videos embedded in the page: small copies that browsers play, each with a strip of frames for print."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from mmalign.compare.report.thumbnails import PIXEL_ART_SIDE, Thumbnail, choose_prompts, frame_strip
from mmalign.core.io.decode import decode_video
from mmalign.core.io.video_files import encode_for_browsers

MOST_CLIPS = 400
"""Above this number of videos, only some of the prompts are shown, evenly spaced and never chosen by score."""
MOST_BYTES = 27_000_000
"""Of all embedded clips and strips; with tables and plots the page stays under 30 MB."""
FEW_PROMPTS = 12
"""Clips are shrunk further only where fewer prompts than this would fit."""
QUALITIES = ((256, 0), (192, 6), (128, 12))
"""Longer side in pixels, and what is added to the codec's crf; the first that lets enough prompts fit is used."""
STRIP_FRAMES, STRIP_SIDE = 6, 96
FALLBACK_RATE = 8.0


@dataclass(frozen=True)
class Clip:
    """A video as a data URI (empty where PyAV writes no format that browsers play), with a strip of its frames.

    `frames`, `rate`, `width` and `height` are those of the original; `shrunk` if the clip is smaller.
    """

    uri: str
    strip: Thumbnail
    frames: int
    rate: float
    width: int
    height: int
    shrunk: bool

    @property
    def size(self) -> int:
        """The number of characters that the clip takes in the page."""
        return len(self.uri) + len(self.strip.uri)


def embed_clip(path: Path, quality: tuple[int, int] = QUALITIES[0]) -> Clip:
    """Return a video file as a clip of one of the `QUALITIES`; all its frames, at its rate."""
    levels, rate = decode_video(path)
    side, crf = quality
    rate = rate or FALLBACK_RATE
    encoded = encode_for_browsers(_resized(levels, side), rate, crf)
    uri = "" if encoded is None else f"data:{encoded[0]};base64,{base64.b64encode(encoded[1]).decode()}"
    height, width = levels.shape[-2:]
    strip = frame_strip(levels, STRIP_FRAMES, STRIP_SIDE)
    return Clip(uri, strip, len(levels), rate, width, height, shrunk=max(height, width) > side)


def fit_clips(
    prompts: int, clips_per_prompt: int, embed: Callable[[int, tuple[int, int]], list[Clip]]
) -> dict[int, list[Clip]]:
    """Return the prompts that fit into the page, evenly spaced, each with its clips: `embed(prompt, quality)`."""
    shown = choose_prompts(prompts, clips_per_prompt, MOST_CLIPS)
    kept: dict[int, list[Clip]] = {}
    for quality in QUALITIES:
        clips = {index: embed(index, quality) for index in shown}
        kept = _fitting(clips)
        if len(kept) >= min(len(shown), FEW_PROMPTS):
            break
    return kept


def _fitting(clips: Mapping[int, list[Clip]]) -> dict[int, list[Clip]]:
    """Return as many prompts as fit, evenly spaced."""
    sizes = {index: sum(clip.size for clip in held) for index, held in clips.items()}
    for count in range(len(clips), 0, -1):
        kept = [list(clips)[place] for place in choose_prompts(len(clips), 1, count)]
        if sum(sizes[index] for index in kept) <= MOST_BYTES:
            return {index: clips[index] for index in kept}
    return {}


def _resized(levels: UInt8[Tensor, "frames 3 height width"], side: int) -> UInt8[Tensor, "frames 3 h w"]:
    """Return frames of even sides: large ones shrunk to `side`, small ones enlarged by a whole factor.

    Colours have half the resolution in what browsers play, which would blur small pictures.
    """
    height, width = levels.shape[-2:]
    if max(height, width) <= PIXEL_ART_SIDE:
        factor = max(1, side // max(height, width))
        levels = levels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        height, width = levels.shape[-2:]
    scale = min(1.0, side / max(height, width))
    even = [max(2, 2 * round(scale * one / 2)) for one in (height, width)]
    if even == [height, width]:
        return levels
    resized = F.interpolate(levels.float(), even, mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).byte()
