"""Clips as one image: a row of frames a clip, with its caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mmalign.core.io.grid import image_grid
from mmalign.shapes.motion.language import caption
from mmalign.shapes.motion.world import render, sample_clip


def film_strips(clips: Sequence[UInt8[Tensor, "frames 3 height width"]], labels: Sequence[str]) -> Image.Image:
    """Draw the frames of each clip in a row, beside its label."""
    return image_grid([[frame.float() / 255 for frame in clip] for clip in clips], row_labels=labels, cell=96)


def random_strips(count: int, seed: int) -> Image.Image:
    """Draw random training clips with a caption each."""
    rng = np.random.default_rng(seed)
    clips = [sample_clip(rng) for _ in range(count)]
    return film_strips([render(clip) for clip in clips], [caption(rng, clip) for clip in clips])
