"""The section of a run's configuration for video models (Wan, ...), which must have one; image models refuse it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.config.sections import Count, Positive, StrictModel

if TYPE_CHECKING:
    from pipelines.video import VideoOptions


class VideoConfig(StrictModel):
    """The geometry of a run's videos; null: the model's own, which is seldom what fits into memory."""

    height: Count | None = None
    """of a frame, in pixels"""
    width: Count | None = None
    """of a frame, in pixels"""
    frames: Count | None = None
    """of a video; most families take 4k + 1 of them, LTX-Video and CogVideoX 8k + 1"""
    fps: Positive | None = None
    """frames a second: how fast videos play, and what LTX-Video's network makes of time"""

    def options(self) -> VideoOptions:
        """Return the choices as the generator takes them."""
        from pipelines.video import VideoOptions

        return VideoOptions(self.height, self.width, self.frames, self.fps)
