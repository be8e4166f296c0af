"""Reads a clip of moving Shapes, drawn or generated: the objects of every frame, by geometry alone.

The masks are those of the image oracle. A shape is told by the overlap of its mask, brought to unit area around its
centroid, with templates drawn once: a template fit of :mod:`mmalign.shapes.oracle` with ten drawings an object would
take five times as long, and learning online reads thousands of clips.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from mmalign.shapes.oracle import (
    COLOUR_NAMES,
    MIN_AREA,
    MIN_FIT,
    SIZE_BORDER,
    Reading,
    Seen,
    along,
    by_colour,
    pixel_noise,
    shape_units,
)
from mmalign.shapes.world import BACKGROUNDS, SHAPES, SIZE, coverage

ClipReading = tuple[Reading, ...]
"""The reading of every frame; their qualities are not read and 1."""

_FOREGROUND = 42.0
_SIDE, _EXTENT = 28, 1.4
"""The unit canvas: samples a side, and how far it reaches from the centroid in roots of the area."""
_WIDTHS, _GROWTHS = (0.0, 0.9, 1.6), (0.94, 1.0, 1.06)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_BACKGROUND_COLOURS = np.array(list(BACKGROUNDS.values()), np.float32)
_CONNECTED = np.zeros((3, 3, 3), int)
_CONNECTED[1] = 1


def read(clip: UInt8[np.ndarray, "frames 64 64 3"]) -> ClipReading:
    """Read a clip, `[F, 64, 64, 3]` uint8 (or float in [0, 255]).

    Raises:
        ValueError: its frames are not 64x64 RGB.
    """
    if clip.ndim != 4 or clip.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle reads clips of {SIZE}x{SIZE} RGB frames, got an array of shape {clip.shape}")
    pixels = clip.astype(np.float32)
    if float(np.median([pixel_noise(frame) for frame in pixels])) > 5.0:
        pixels = ndimage.gaussian_filter(pixels, (0.0, 1.0, 1.0, 0.0), mode="nearest")
    plain = np.median(_border(pixels), 1)  # [F, 3]
    names = np.linalg.norm(plain[:, None] - _BACKGROUND_COLOURS, axis=-1).argmin(1)
    parts, number = ndimage.label(
        np.linalg.norm(pixels - plain[:, None, None], axis=-1) > _FOREGROUND, structure=_CONNECTED
    )
    objects: list[list[Seen]] = [[] for _ in clip]
    for index, window in enumerate(ndimage.find_objects(parts), start=1):
        frame = window[0].start
        objects[frame] += _objects(pixels[frame], plain[frame], parts[frame], index, window[1:])
    return tuple(
        Reading(tuple(sorted(seen, key=lambda o: -o.radius)), _BACKGROUND_NAMES[name], 1.0, 1.0, 1.0)
        for seen, name in zip(objects, names, strict=True)
    )


_CACHE: dict[bytes, ClipReading] = {}
_CACHE_LIMIT = 2_000


def read_cached(clip: UInt8[np.ndarray, "frames 64 64 3"]) -> ClipReading:
    """Return `read(clip)`, remembered by its pixels: several rewards read the same clips."""
    pixels = clip.tobytes()
    if pixels not in _CACHE:
        if len(_CACHE) >= _CACHE_LIMIT:
            _CACHE.clear()
        _CACHE[pixels] = read(clip)
    return _CACHE[pixels]


def _border(pixels: np.ndarray) -> np.ndarray:
    edges = (pixels[:, :3], pixels[:, -3:], pixels[:, :, :3], pixels[:, :, -3:])
    return np.concatenate([edge.reshape(len(pixels), -1, 3) for edge in edges], 1)


def _objects(
    pixels: np.ndarray, plain: np.ndarray, parts: np.ndarray, index: int, window: tuple[slice, ...]
) -> list[Seen]:
    """The things in one connected part of a frame; two of different colours may touch."""
    grown = tuple(slice(max(edge.start - 3, 0), edge.stop + 3) for edge in window)
    member = parts[grown] == index
    if member.sum() < MIN_AREA:
        return []
    others, found = (parts[grown] > 0) & ~member, []
    _, fraction = along(pixels[grown], plain, 0.0)
    for colour, mask in by_colour(pixels[grown], plain, member):
        near = ndimage.binary_dilation(mask, iterations=2) & ~others & ~(member & ~mask)
        seen = _classify(np.where(near, fraction[..., colour], 0.0), colour, grown[1].start, grown[0].start)
        found += [seen] if seen else []
    return found


def _classify(alpha: Float[np.ndarray, "height width"], colour: int, left: int, top: int) -> Seen | None:
    """The template that overlaps a soft mask best."""
    area = float(alpha.sum())
    if area < MIN_AREA:
        return None
    ys, xs = (np.arange(side) + 0.5 for side in alpha.shape)
    x, y = float(alpha.sum(0) @ xs) / area, float(alpha.sum(1) @ ys) / area
    steps = _steps() * area**0.5
    points = np.meshgrid(y - 0.5 + steps, x - 0.5 + steps, indexing="ij")
    unit = ndimage.map_coordinates(alpha, points, order=1, mode="constant").ravel()
    templates, names = _templates()
    fits = np.minimum(templates, unit).sum(1) / np.maximum(templates, unit).sum(1)
    best = int(fits.argmax())
    shape, grow = names[best]
    share, dx, dy = shape_units()[shape]
    radius = grow * (area / share) ** 0.5
    return Seen(
        shape if fits[best] >= MIN_FIT else "unknown",
        COLOUR_NAMES[colour],
        "small" if radius < SIZE_BORDER else "large",
        x - dx * radius + left,
        y - dy * radius + top,
        radius,
        float(fits[best]),
    )


@lru_cache(maxsize=1)
def _steps() -> np.ndarray:
    return ((np.arange(_SIDE) + 0.5) / _SIDE - 0.5) * 2 * _EXTENT


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Every shape on the unit canvas in three sizes, crisp and blurred `[T, SIDE * SIDE]`; (shape, growth) of each."""
    scale = 20.0
    rows, names = [], []
    for shape in SHAPES:
        share, dx, dy = shape_units()[shape]
        for grow in _GROWTHS:
            radius = grow * scale / share**0.5
            drawn = coverage(shape, radius, 64.0 - dx * radius, 64.0 - dy * radius, 128)
            for width in _WIDTHS:
                blurred = ndimage.gaussian_filter(drawn, 0.6 + width * scale / 16.0)
                axis = 63.5 + _steps() * scale
                points = np.meshgrid(axis, axis, indexing="ij")
                rows.append(ndimage.map_coordinates(blurred, points, order=1).ravel())
                names.append((shape, grow))
    return np.stack(rows), names
