"""Training data of the Shapes models: seeded scenes, drawn and captioned, held in memory."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from mmalign.shapes.language import caption
from mmalign.shapes.world import render, sample_scene


@dataclass
class Corpus:
    """Images `[N, 64, 64, 3]` uint8 and the captions of each (several wordings an image)."""

    images: np.ndarray
    captions: list[list[str]]


def _chunk(arguments: tuple[int, int, int, float, int]) -> tuple[np.ndarray, list[list[str]]]:
    seed, index, count, crisp, wordings = arguments
    rng = np.random.default_rng([seed, index])
    images, captions = [], []
    for _ in range(count):
        scene = sample_scene(rng, crisp=crisp)
        images.append(render(scene))
        captions.append([caption(rng, scene) for _ in range(wordings)])
    return np.stack(images), captions


def build_corpus(count: int, *, seed: int = 0, crisp: float = 0.65, wordings: int = 3, workers: int = 2) -> Corpus:
    """Draw `count` training scenes. The same arguments (workers aside) always give the same corpus."""
    size = 1000
    jobs = [(seed, i, min(size, count - i * size), crisp, wordings) for i in range(-(-count // size))]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_chunk, jobs))
    else:
        parts = [_chunk(job) for job in jobs]
    return Corpus(np.concatenate([p[0] for p in parts]), [c for p in parts for c in p[1]])
