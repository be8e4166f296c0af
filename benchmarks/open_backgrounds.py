"""What a model draws behind things where the caption says nothing: `python -m benchmarks.open_backgrounds FOLDER`.

FOLDER is the output of a comparison on prompts of the Shapes world. For each of its systems, over the images of the
prompts that name no background: the entropy in bits of the backgrounds that the oracle reads, with its 95 % interval
(percentile bootstrap over prompts), and the most frequent background. A reward that prefers a background, however
little, lets a group method draw no other: correctness and quality do not show it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmalign.shapes import oracle
from mmalign.shapes.language import parse
from mmalign.shapes.world import BACKGROUNDS

RESAMPLES = 2_000
NAMES = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Spread:
    """How a system chooses the backgrounds that are left to it."""

    images: int
    bits: float
    low: float
    high: float
    favourite: str
    share: float


def entropy(counts: np.ndarray) -> float:
    """Return the entropy in bits of counts `[kinds]`."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def spread(backgrounds: Sequence[Sequence[str]]) -> Spread:
    """Return the spread of the backgrounds of each prompt's images."""
    rows = [[names.count(name) for name in NAMES] for names in map(list, backgrounds)]
    counts = np.array(rows, np.float64)
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    low, high = np.percentile([entropy(counts[some].sum(0)) for some in drawn], [2.5, 97.5])
    name, number = Counter(name for names in backgrounds for name in names).most_common(1)[0]
    total = int(counts.sum())
    return Spread(total, entropy(counts.sum(0)), float(low), float(high), name, number / total)


def of_comparison(folder: Path) -> dict[str, Spread]:
    """Return the spread of every system of a comparison.

    Raises:
        FileNotFoundError: the folder holds no comparison.
    """
    with (folder / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if parse(row["prompt"]).background is None]
    images: dict[str, dict[int, set[str]]] = {}
    for row in rows:
        place = images.setdefault(row["system"], {}).setdefault(int(row["index"]), set())
        place.add(f"{int(row['index']):04d}-{row['seed']}.png")
    return {
        system: spread([[_background(folder / "images" / system / name) for name in sorted(names)] for names in found])
        for system, found in ((system, prompts.values()) for system, prompts in images.items())
    }


def _background(path: Path) -> str:
    return oracle.read(np.asarray(Image.open(path).convert("RGB"))).background


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each system."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.open_backgrounds", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output of `mmalign compare`")
    folder = parser.parse_args(arguments).folder
    if not (folder / "scores.csv").is_file():
        parser.error(f"{folder} has no scores.csv; give the output of `mmalign compare`")
    for system, found in of_comparison(folder).items():
        print(
            f"{system:16} {found.bits:.2f} bits [{found.low:.2f}, {found.high:.2f}] over {found.images} images, "
            f"{found.favourite} {found.share:.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
