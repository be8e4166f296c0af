"""A preference that the base knows nothing of: photographic negatives. `python -m benchmarks.negatives --out DIR`.

For the claim that a reference holds a method back where the preferred images come from another domain than its own
(MaPO, arXiv 2406.06424). DIR gets every drawn scene twice, as it is and with its colours inverted, as `mmalign pairs
sample` would write them; `mmalign pairs label DIR --reward benchmarks.negatives:NegativeCorrectness` then prefers the
inverted ones, and the same reward says how far a model draws what its prompts ask for, as negatives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from mmalign.core.io.images import encode_png
from mmalign.core.io.parquet import atomic_parquet
from mmalign.data.building.sampling import IMAGES_FILE, SCHEMA
from mmalign.shapes.language import caption
from mmalign.shapes.rewards import ShapesCorrectness
from mmalign.shapes.world import render, sample_scene


class NegativeCorrectness(ShapesCorrectness):
    """What `shapes-correctness` says of the picture with its colours inverted."""

    name: ClassVar[str] = "negative-correctness"

    def score(self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> Tensor:
        """Grade each picture's negative against its prompt, in [0, 1]."""
        return super().score(1 - media, prompts, references)


def write_negatives(folder: Path, count: int, seed: int = 0) -> Path:
    """Write `count` drawn scenes, each plain and inverted, with a true caption; return the file."""
    rng, path = np.random.default_rng(seed), folder / IMAGES_FILE
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_parquet(path, SCHEMA, {"scenes": count, "seed": seed}) as writer:
        for number in range(count):
            scene = sample_scene(rng, crisp=1.0)
            plain, prompt = render(scene), caption(rng, scene)
            for index, picture in enumerate((plain, 255 - plain)):
                writer.add(
                    {
                        "prompt": prompt,
                        "category": "",
                        "prompt_id": f"scene-{number}",
                        "seed": index,
                        "image": encode_png(Image.fromarray(picture)),
                        "model": "drawn",
                    }
                )
    return path


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.negatives", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="scenes (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count {options.count}: at least 1 is allowed")
    print(f"{options.count} scenes, twice each: {write_negatives(options.out, options.count)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
