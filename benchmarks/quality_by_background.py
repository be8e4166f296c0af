"""Whether `shapes-quality` is flat in the background: on drawn scenes, and on the images of a comparison.

    python -m benchmarks.quality_by_background [FOLDER]

The same scenes are drawn on each background and degraded alike, so a difference between backgrounds is the oracle's.
With FOLDER, the output of `mmalign compare` on Shapes prompts, the parts of quality follow for each system by the
background that was drawn; and *soft*, the number of half-way pixels at the edges of things, in units of a crisp
drawing's. It is read from each thing's own flat colour, which quality is not, so it tells whether the images differ.
*alike* is the quality that drawn scenes have on that background when they are blurred to the same *soft*.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from mmalign.shapes import oracle
from mmalign.shapes.world import BACKGROUNDS, Scene, coverage, degrade, render, sample_scene
from mmalign.shapes.world import Quality as Render

BLURS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Standard deviations in pixels."""
KINDS = (
    Render(),
    *(Render(kind, strength) for kind in ("blurred", "noisy", "low contrast") for strength in (0.0, 0.5)),
)


def scenes(count: int) -> list[Scene]:
    """Return random scenes, crisp."""
    rng = np.random.default_rng(0)
    return [sample_scene(rng, crisp=1.0) for _ in range(count)]


def drawn_quality(some: Sequence[Scene], kind: Render) -> dict[str, float]:
    """Return the mean quality of the scenes, degraded alike, on each background."""
    return {
        name: float(np.mean([oracle.quality(render(replace(one, background=name, quality=kind))) for one in some]))
        for name in BACKGROUNDS
    }


def uneven(image: np.ndarray, spread: float, seed: int) -> np.ndarray:
    """Add smooth unevenness of a standard deviation in 8-bit steps, as autoencoders leave it."""
    waves = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(image.shape), (2, 2, 0))
    return degrade(image.astype(np.float32) + spread * waves / waves.std(), Render())


def softness(image: np.ndarray, reading: oracle.Reading) -> float | None:
    """Return the median over things of their half-way pixels, in units of those of a crisp drawing.

    Half-way: 15 to 85 % of the way from the background's colour to the thing's own, the median of its inside.
    """
    pixels, found = image.astype(np.float32), []
    edges = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), 0)
    for thing in reading.objects:
        if thing.shape == "unknown":
            continue
        crisp = coverage(thing.shape, thing.radius, thing.x, thing.y)
        inside = ndimage.binary_erosion(crisp >= 1)
        if inside.sum() < 8:
            continue
        ray = np.median(pixels[inside], 0) - ground
        near = ndimage.binary_dilation(crisp > 0, iterations=3)
        way = np.where(near, (pixels - ground) @ ray / max(float(ray @ ray), 1.0), 0.0)
        half = [((0.15 < one) & (one < 0.85)).sum() for one in (way, crisp)]
        if half[1]:
            found.append(half[0] / half[1])
    return float(np.median(found)) if found else None


def calibration(some: Sequence[Scene]) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each background softness and quality of drawn scenes, blurred more and more."""
    found = {}
    for name in BACKGROUNDS:
        soft, quality = [], []
        for blur in BLURS:
            images = [ndimage.gaussian_filter(_plain(one, name), (blur, blur, 0), mode="nearest") for one in some]
            readings = [oracle.read(degrade(image, Render())) for image in images]
            rates = [softness(image, reading) for image, reading in zip(images, readings, strict=True)]
            soft.append(float(np.mean([rate for rate in rates if rate is not None])))
            quality.append(float(np.mean([reading.quality for reading in readings])))
        found[name] = (soft, quality)
    return found


def _plain(scene: Scene, background: str) -> np.ndarray:
    return render(replace(scene, background=background)).astype(np.float32)


def print_drawn(some: Sequence[Scene]) -> None:
    """Print the quality of drawn scenes by kind of degradation and background."""
    print(
        f"drawn scenes: {len(some)}, the same on every background".ljust(44), *(f"{name:>7}" for name in BACKGROUNDS)
    )
    for kind in KINDS:
        row = drawn_quality(some, kind)
        print(f"  {kind.kind} {kind.strength:g}".ljust(44), *(f"{value:7.3f}" for value in row.values()))
    for spread in (4.0, 8.0):
        row = {
            name: np.mean([oracle.quality(uneven(_plain(one, name), spread, one.noise_seed)) for one in some])
            for name in BACKGROUNDS
        }
        print(f"  uneven by {spread:g} of 255".ljust(44), *(f"{value:7.3f}" for value in row.values()))


def print_images(folder: Path, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    """Print the parts of quality of a comparison's images by system and background."""
    print(f"{'system':16} {'ground':7} images quality sharp clean contrast  soft alike")
    for system in sorted(path for path in (folder / "images").iterdir() if path.is_dir()):
        rows: dict[str, list[tuple[float, ...]]] = {}
        for path in sorted(system.glob("*.png")):
            image = np.asarray(Image.open(path).convert("RGB"))
            reading = oracle.read(image)
            soft = softness(image, reading)
            if soft is not None:
                parts = (reading.quality, reading.sharpness, reading.cleanness, reading.contrast, soft)
                rows.setdefault(reading.background, []).append(parts)
        for name in BACKGROUNDS:
            if name in rows:
                quality, sharp, clean, contrast, soft = np.mean(rows[name], axis=0)
                alike = np.interp(soft, *curves[name])
                print(
                    f"{system.name:16} {name:7} {len(rows[name]):6} {quality:7.3f} {sharp:5.3f} {clean:5.3f} "
                    f"{contrast:8.3f} {soft:5.2f} {alike:5.3f}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality_by_background",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="output of `mmalign compare`")
    parser.add_argument("--scenes", type=int, default=100, help="scenes drawn on each background")
    given = parser.parse_args(arguments)
    if given.folder is not None and not (given.folder / "images").is_dir():
        parser.error(f"{given.folder} has no folder images; give the output of `mmalign compare`")
    some = scenes(given.scenes)
    print_drawn(some)
    if given.folder is not None:
        print_images(given.folder, calibration(some))
    return 0


if __name__ == "__main__":
    sys.exit(main())
