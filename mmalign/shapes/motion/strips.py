"""Clips as one image: a row of frames a clip, with its caption."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmalign.core.io.grid import frame_strips
from mmalign.shapes.motion.language import caption
from mmalign.shapes.motion.world import FRAMES, render, sample_clip


def random_strips(count: int, seed: int) -> Image.Image:
    """Draw random training clips with a caption each."""
    rng = np.random.default_rng(seed)
    clips = [sample_clip(rng) for _ in range(count)]
    videos = [render(clip).float() / 255 for clip in clips]
    return frame_strips(videos, [caption(rng, clip) for clip in clips], frames=FRAMES, cell=96)
