"""How often a reward and the oracle prefer the same one of two images of a prompt."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mmalign.core.io.images import find_images, open_image
from mmalign.core.progress import track
from mmalign.shapes import oracle
from mmalign.shapes.language import parse


@dataclass(frozen=True)
class Samples:
    """Images made from prompts, and the oracle's readings of them.

    images: `[N, 64, 64, 3]` uint8; readings: their content; correctness: `[N]` in [0, 1].
    """

    images: np.ndarray
    prompts: list[str]
    readings: list[oracle.Reading]
    correctness: np.ndarray

    @property
    def quality(self) -> np.ndarray:
        """Render quality in [0, 1], `[N]`."""
        return np.array([reading.quality for reading in self.readings])

    def groups(self) -> list[np.ndarray]:
        """Indices of the images of each prompt."""
        found = defaultdict(list)
        for index, prompt in enumerate(self.prompts):
            found[prompt].append(index)
        return [np.array(members) for members in found.values()]

    def pairs(self, least: float = 1e-6) -> np.ndarray:
        """Indices (more correct, less correct) `[P, 2]` of images of one prompt that differ by more than `least`."""
        return self._pairs(self.correctness, least)

    def quality_pairs(self, least: float = 0.1) -> np.ndarray:
        """The same for quality `[P, 2]`, among images that are equally correct."""
        found = self._pairs(self.quality, least)
        return found[np.abs(np.diff(self.correctness[found], axis=1))[:, 0] < 1e-6]

    def _pairs(self, values: np.ndarray, least: float) -> np.ndarray:
        found = [
            (a, b) if values[a] > values[b] else (b, a)
            for members in self.groups()
            for a, b in combinations(members, 2)
            if abs(values[a] - values[b]) > least
        ]
        return np.array(found, dtype=int).reshape(-1, 2)


@dataclass(frozen=True)
class Agreement:
    """Shares of pairs on which a reward agrees with the oracle (a tie counts one half), and how many there were."""

    reward: str
    correctness: float
    correctness_pairs: int
    quality: float
    quality_pairs: int


def read_samples(*sources: Path) -> Samples:
    """Read the output of `mmalign pairs sample`, and judge every image by the oracle.

    Raises:
        UserError: there are no samples at one of `sources`.
        PromptError: a prompt is not of the Shapes language.
    """
    rows = [
        row
        for source in sources
        for row in pq.read_table(find_images(source), columns=["prompt", "image"]).to_pylist()
    ]
    images, readings, correctness = [], [], []
    with track(len(rows), "oracle") as job:
        for row in rows:
            pixels = np.asarray(open_image(row["image"], f"image of '{row['prompt']}'"))
            reading = oracle.read(pixels)
            images.append(pixels)
            readings.append(reading)
            correctness.append(oracle.judge(parse(row["prompt"]), reading))
            job.advance(1)
    return Samples(np.stack(images), [row["prompt"] for row in rows], readings, np.array(correctness))


def agreement(name: str, scores: np.ndarray, samples: Samples) -> Agreement:
    """Compare the scores `[N]` of a reward (more is better) with the oracle's."""

    def share(pairs: np.ndarray) -> float:
        difference = scores[pairs[:, 0]] - scores[pairs[:, 1]]
        return float(np.mean((difference > 0) + 0.5 * (difference == 0))) if len(pairs) else float("nan")

    pairs, quality = samples.pairs(), samples.quality_pairs()
    return Agreement(name, share(pairs), len(pairs), share(quality), len(quality))
