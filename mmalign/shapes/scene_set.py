"""Freshly drawn scenes with captions that are true of them, as a table of good images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmalign.core.io.columns import SCHEMA
from mmalign.core.io.images import encode_png
from mmalign.core.io.parquet import atomic_parquet
from mmalign.shapes.language import caption
from mmalign.shapes.world import render, sample_scene


def write_scenes(out: Path, count: int, *, seed: int = 0, crisp: float = 1.0) -> None:
    """Write `count` scenes without held-out combinations: `id, image, caption, label`, every label good.

    `crisp` is the share of images that are not degraded.
    """
    rng = np.random.default_rng(seed)
    with atomic_parquet(out, SCHEMA, {"scenes": count, "seed": seed, "crisp": crisp}) as writer:
        for number in range(count):
            scene = sample_scene(rng, crisp=crisp)
            picture = encode_png(Image.fromarray(render(scene)))
            writer.add({"id": f"scene-{number}", "image": picture, "caption": caption(rng, scene), "label": "good"})
