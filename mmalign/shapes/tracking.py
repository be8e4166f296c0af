"""Tracks read from pixels: follow every shape of a Shapes video through its frames, without the scene graph.

Each connected part of a frame is told apart by moments of its soft mask (Hu's idea, with a symmetry a moment:
three corners, four, five), a hundred times faster than the template fits of :mod:`mmalign.shapes.oracle` that a still
image deserves. Frames are continued over their edges first, because the world wraps around. The shapes of one video
all differ in kind, so the kind tells which sighting belongs to which track.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage
from torch import Tensor

from mmalign.shapes.video import Sighting, Track
from mmalign.shapes.world import COLOURS, SHAPES, coverage

_PAD = 16
_MIN_AREA = 12.0
_FOREGROUND = 40.0
_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)


def follow(video: UInt8[Tensor, "frames 3 size size"]) -> tuple[Track, ...]:
    """The track of every kind of shape that is seen in any frame, in the order of `world.SHAPES`."""
    moments = [{s.shape: s for s in sight(frame)} for frame in video.permute(0, 2, 3, 1).numpy()]
    kinds = [shape for shape in SHAPES if any(shape in moment for moment in moments)]
    return tuple(tuple(moment.get(shape) for moment in moments) for shape in kinds)


def sight(frame: UInt8[np.ndarray, "size size 3"]) -> list[Sighting]:
    """The shapes in one frame, each once, with its centre inside the frame; the most frequent colour is background."""
    size = frame.shape[0]
    wide = np.pad(frame, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="wrap").astype(np.float32)
    codes = frame.astype(np.int32) @ (1 << 16, 1 << 8, 1)
    values, counts = np.unique(codes, return_counts=True)
    code = int(values[counts.argmax()])
    offset = wide - np.array((code >> 16, code >> 8 & 255, code & 255), np.float32)
    strength = np.linalg.norm(offset, axis=-1)
    parts, number = ndimage.label(strength > _FOREGROUND, np.ones((3, 3)))
    found = []
    for index, window in enumerate(ndimage.find_objects(parts), start=1):
        middles = [(edge.start + edge.stop) / 2 - _PAD for edge in window]
        if not all(-3 < middle < size + 3 for middle in middles):  # a copy, whose original is read instead
            continue
        grown = tuple(slice(max(edge.start - 2, 0), edge.stop + 2) for edge in window)
        near = ndimage.binary_dilation(parts[grown] == index, iterations=2) & np.isin(parts[grown], (0, index))
        seen = _recognise(near * strength[grown], wide[grown])
        if seen is None:
            continue
        shape, colour, x, y, radius = seen
        x, y = x + grown[1].start - _PAD, y + grown[0].start - _PAD
        if 0 <= x < size and 0 <= y < size:
            found.append(Sighting(shape, colour, x, y, radius))
    return found


def _recognise(strength: np.ndarray, pixels: np.ndarray) -> tuple[str, str, float, float, float] | None:
    """Shape, colour, centre and radius of the one thing in a window, from its pixels' distance to the background."""
    core = strength >= 0.97 * strength.max()
    alpha = np.minimum(strength / np.median(strength[core]), 1.0)
    if alpha.sum() < _MIN_AREA:
        return None
    colour = _NAMES[np.linalg.norm(_PALETTE - np.median(pixels[core], 0), axis=1).argmin()]
    area, x, y, features = _moments(alpha)
    shape = min(_units(), key=lambda name: float(np.abs(features - _units()[name][1]).sum()))
    unit_area, dx, dy = _units()[shape][0]
    radius = (area / unit_area) ** 0.5
    return shape, colour, x - dx * radius, y - dy * radius, radius


def _moments(alpha: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """Area, centroid and the scale- and rotation-free moments: spread, and symmetry of order three, four and five."""
    ys, xs = (np.arange(side) + 0.5 for side in alpha.shape)
    area = float(alpha.sum())
    x, y = float(alpha.sum(0) @ xs) / area, float(alpha.sum(1) @ ys) / area
    z = (xs - x) + 1j * (ys - y)[:, None]
    spread = (alpha * np.abs(z) ** 2).sum() / area**2
    corners = [abs((alpha * z**k).sum()) / area ** (1 + k / 2) for k in (3, 4, 5)]
    return area, x, y, np.array([3 * spread, *(4 * corner for corner in corners)])


@lru_cache(maxsize=1)
def _units() -> dict[str, tuple[tuple[float, float, float], np.ndarray]]:
    """(area / r^2, centroid offset / r in x and y) and the moments of every shape, from a drawing of radius 60."""
    table = {}
    for shape in SHAPES:
        area, x, y, features = _moments(coverage(shape, 60.0, 80.0, 80.0, 160))
        table[shape] = (area / 3600.0, (x - 80.0) / 60.0, (y - 80.0) / 60.0), features
    return table
