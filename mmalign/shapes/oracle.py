"""The oracle: reads any 64x64 image of the Shapes world and lists its objects, by geometry alone.

Steps: the background and the contrast from the border; a soft mask per object (how far each pixel lies on the way from
the background's colour to the object's); connected parts, split where two colours touch; the shape by overlap with
drawn templates; the quality from edge width, flat-area noise and contrast. No learned weight is involved, so the
oracle cannot be exploited as a trained reward can, and it is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from mmalign.shapes.language import Group, Query, parse
from mmalign.shapes.world import BACKGROUNDS, COLOURS, SHAPES, SIZE, coverage, holds

PALETTE = np.array(list(COLOURS.values()), np.float32)
COLOUR_NAMES = tuple(COLOURS)
MIN_AREA, MIN_FIT, SIZE_BORDER = 24.0, 0.55, 10.5
_GRAY = 128.0


@dataclass(frozen=True)
class Seen:
    """One object as read from pixels; `shape` is "unknown" when no template fits. Lengths in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """A reading of the oracle: objects (largest first), background, and the three parts of quality in [0, 1]."""

    objects: tuple[Seen, ...]
    background: str
    sharpness: float
    cleanness: float
    contrast: float

    @property
    def quality(self) -> float:
        """Render quality in [0, 1]: the product of sharpness, cleanness and contrast."""
        return self.sharpness * self.cleanness * self.contrast


def read(image: np.ndarray) -> Reading:
    """Read an image, `[64, 64, 3]` uint8 (or float in [0, 255]).

    Raises:
        ValueError: the image is not 64x64 RGB.
    """
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle reads {SIZE}x{SIZE} RGB images, got an array of shape {image.shape}")
    pixels = image.astype(np.float32)
    noise = pixel_noise(pixels)
    smooth = pixels
    if noise > 5.0:
        smooth = ndimage.median_filter(pixels, (3, 3, 1), mode="nearest")
        smooth = ndimage.gaussian_filter(smooth, (0.6, 0.6, 0), mode="nearest")
    background, contrast, plain = _background(smooth)
    smooth = np.where(np.abs(smooth - plain).max(2, keepdims=True) < max(10.0, 1.2 * noise), plain, smooth)
    clean = _GRAY + (smooth - _GRAY) / contrast
    objects, widths = _objects(clean, _GRAY + (plain - _GRAY) / contrast)
    width = float(np.median(widths)) if widths else 3.0
    if noise > 5.0:
        width = max(1.0, width - 0.9)  # the denoiser above widened the edges itself
    return Reading(
        objects=tuple(sorted(objects, key=lambda o: -o.radius)),
        background=background,
        sharpness=float(np.exp(-max(width - 1.7, 0.0))),
        cleanness=float(np.exp(-max(noise - 2.0, 0.0) / 9.0)),
        contrast=float(np.clip((contrast - 0.3) / 0.62, 0.0, 1.0)),
    )


_CACHE: dict[bytes, Reading] = {}
_CACHE_LIMIT = 20_000


def read_cached(image: np.ndarray) -> Reading:
    """Return `read(image)`, of uint8 `[64, 64, 3]`, remembered by its pixels: many measures read the same images."""
    pixels = image.tobytes()
    if pixels not in _CACHE:
        if len(_CACHE) >= _CACHE_LIMIT:
            _CACHE.clear()
        _CACHE[pixels] = read(image)
    return _CACHE[pixels]


def pixel_noise(pixels: np.ndarray) -> float:
    """Standard deviation of pixel noise, from the diagonal second differences of the flattest half of the image."""
    second = pixels[:-1, :-1] - pixels[1:, :-1] - pixels[:-1, 1:] + pixels[1:, 1:]
    return float(np.median(np.abs(second)) * 1.4826 / 2.0)


def _background(pixels: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Name of the background, contrast against middle gray in [0.3, 1], and its colour as it appears."""
    border = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
        ]
    )
    seen = np.median(border, 0)
    best = ("gray", 1.0, np.inf)
    for name, colour in BACKGROUNDS.items():
        offset = np.asarray(colour, np.float32) - _GRAY
        contrast = float(np.clip((seen - _GRAY) @ offset / (offset @ offset), 0.33, 1.0)) if name != "gray" else 1.0
        miss = float(np.abs(seen - _GRAY - contrast * offset).max())
        if miss < best[2]:
            best = (name, contrast, miss)
    contrast = best[1] if best[0] != "gray" else _object_contrast(pixels, seen)
    return best[0], contrast if contrast < 0.9 else 1.0, seen


def _object_contrast(pixels: np.ndarray, background: np.ndarray) -> float:
    """Contrast on a gray background, from the objects alone: the scale at which their cores match the palette."""
    distance = np.abs(pixels - background).max(2)
    inner = ndimage.minimum_filter(distance, 3) > 12.0
    if inner.sum() < 12:
        return 1.0
    core = pixels[inner]
    scales = np.arange(0.36, 1.001, 0.04, dtype=np.float32)
    scaled = _GRAY + scales[:, None, None] * (PALETTE - _GRAY)  # [S, 8, 3]
    miss = np.linalg.norm(core[None, :, None] - scaled[:, None], axis=-1).min(2)  # [S, P]
    return float(scales[np.argmin(np.median(miss, 1) + 4.0 * (1.0 - scales))])


def along(pixels: np.ndarray, plain: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance of pixels `[..., 3]` to each segment background -> colour, from `least` of the way on; the fraction."""
    ray = PALETTE - plain  # [8, 3]
    offset = pixels[..., None, :] - plain
    fraction = np.clip((offset * ray).sum(-1) / (ray * ray).sum(-1), least, 1.0)
    return np.linalg.norm(offset - fraction[..., None] * ray, axis=-1), fraction


def _objects(pixels: np.ndarray, plain: np.ndarray) -> tuple[list[Seen], list[float]]:
    """Objects of a contrast-corrected image on the colour `plain`, and the edge width of each in pixels."""
    foreground = np.linalg.norm(pixels - plain, axis=-1) > 42.0
    parts, number = ndimage.label(foreground, np.ones((3, 3)))
    objects, widths = [], []
    for window, part in zip(ndimage.find_objects(parts), range(1, number + 1), strict=True):
        grown = tuple(slice(max(s.start - 3, 0), s.stop + 3) for s in window)
        member = parts[grown] == part
        if member.sum() < MIN_AREA:
            continue
        others = (parts[grown] > 0) & ~member
        for colour, mask in by_colour(pixels[grown], plain, member):
            _, fraction = along(pixels[grown], plain, 0.0)
            near = ndimage.binary_dilation(mask, iterations=2) & ~others & ~(member & ~mask)
            alpha = np.where(near, fraction[..., colour], 0.0)
            seen, width = _classify(alpha, colour, grown[1].start, grown[0].start)
            if seen is not None:
                objects.append(seen)
                widths.append(width)
    return objects, widths


def by_colour(pixels: np.ndarray, plain: np.ndarray, member: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Split one connected part by colour where two touch: (palette index, mask) of each piece that is large enough."""
    miss, _ = along(pixels, plain, 0.6)
    label = np.where(member, miss.argmin(-1), -1)
    core = member & (ndimage.minimum_filter(member, 3))
    votes = np.bincount(label[core if core.sum() >= 8 else member], minlength=len(PALETTE))
    strong = [c for c in range(len(PALETTE)) if votes[c] >= max(16, 0.2 * votes.sum())]
    if len(strong) <= 1:
        return [(int(votes.argmax()), member)]
    nearest = np.where(member, np.array(strong)[miss[..., strong].argmin(-1)], -1)
    pieces = []
    for colour in strong:
        parts, number = ndimage.label(nearest == colour)
        pieces += [(colour, parts == k) for k in range(1, number + 1) if (parts == k).sum() >= MIN_AREA]
    return pieces


@lru_cache(maxsize=1)
def shape_units() -> dict[str, tuple[float, float, float]]:
    """Area / r^2 and the centroid's offset / r (x, y) of every shape."""
    table = {}
    for shape in SHAPES:
        mask = coverage(shape, 60.0, 80.0, 80.0, 160)
        ys, xs = np.mgrid[:160, :160] + 0.5
        area = mask.sum()
        table[shape] = (
            area / 3600.0,
            ((mask * xs).sum() / area - 80.0) / 60.0,
            ((mask * ys).sum() / area - 80.0) / 60.0,
        )
    return table


def _classify(alpha: np.ndarray, colour: int, left: int, top: int) -> tuple[Seen | None, float]:
    """The template that overlaps a soft mask best, and how many times wider its edges are than a crisp drawing's."""
    area = float(alpha.sum())
    if area < MIN_AREA:
        return None, 0.0
    side = max(alpha.shape) + 4
    canvas = np.zeros((side, side), np.float32)
    canvas[2 : 2 + alpha.shape[0], 2 : 2 + alpha.shape[1]] = alpha
    axis = np.arange(side) + 0.5
    x, y = float((canvas.sum(0) * axis).sum() / area), float((canvas.sum(1) * axis).sum() / area)
    edge = float((4 * canvas * (1 - canvas)).sum())

    def fit_of(shape: str, grow: float) -> tuple[float, str, float, float, float, float]:
        unit, dx, dy = shape_units()[shape]
        radius = grow * (area / unit) ** 0.5
        crisp = coverage(shape, radius, x - dx * radius, y - dy * radius, side)
        width = edge / max(float((4 * crisp * (1 - crisp)).sum()), 1e-3)
        template = crisp if width < 2.2 else ndimage.gaussian_filter(crisp, 0.42 * width**0.9)
        fit = float(np.minimum(template, canvas).sum() / np.maximum(template, canvas).sum())
        return fit, shape, radius, x - dx * radius, y - dy * radius, width

    fits = sorted((fit_of(shape, 1.0) for shape in SHAPES), reverse=True)
    fit, shape, radius, cx, cy, width = max(fits + [fit_of(f[1], grow) for f in fits[:2] for grow in (0.94, 1.06)])
    size = "small" if radius < SIZE_BORDER else "large"
    name = shape if fit >= MIN_FIT else "unknown"
    return Seen(name, COLOUR_NAMES[colour], size, cx + left - 2, cy + top - 2, radius, fit), width


# -------------------------------------------------------------------------------------------------- judging


def correctness(prompt: str, image: np.ndarray) -> float:
    """How well the image fits the prompt, graded in [0, 1] (see :func:`judge`)."""
    return judge(parse(prompt), read(image))


def strict_correctness(prompt: str, image: np.ndarray) -> float:
    """1.0 if the image shows exactly the content of the prompt and nothing else, otherwise 0.0."""
    return float(judge(parse(prompt), read(image)) > 1.0 - 1e-6)


def quality(image: np.ndarray) -> float:
    """Render quality in [0, 1]: 1 is crisp, clean and of full contrast, whatever the content."""
    return read(image).quality


def judge(query: Query, reading: Reading) -> float:
    """Grade a reading against a query, in [0, 1].

    Weighted mean of objects with their attributes (weight 5), count (2), relations (2, if any) and background (1, if
    named). The objects part is the best one-to-one assignment of seen to wanted things, divided by the larger of the
    two numbers; so an extra object costs as much as a missing one. 1.0 means strictly correct.
    """
    wanted, seen = _wanted(query), reading.objects
    chosen, match = _matching(query, wanted, seen)
    parts = [(5.0, match / max(len(wanted), len(seen), 1))]
    parts.append((2.0, 1.0 - abs(len(wanted) - len(seen)) / max(len(wanted), len(seen))))
    if query.relations:
        parts.append((2.0, float(np.mean([_related(query, r, wanted, seen, chosen) for r in query.relations]))))
    if query.background is not None:
        parts.append((1.0, float(reading.background == query.background)))
    return float(sum(w * v for w, v in parts) / sum(w for w, _ in parts))


def found_things(query: Query, reading: Reading) -> list[tuple[int, Seen]]:
    """Return the seen thing that stands for each wanted thing, with the number of its group; none where none fits.

    The assignment is that of `judge`; a thing fits if it has at least one of the attributes that are named.
    """
    wanted, seen = _wanted(query), reading.objects
    chosen, _ = _matching(query, wanted, seen)
    pairs = [(wanted[number], seen[thing]) for number, thing in sorted(chosen.items())]
    return [(index, thing) for (index, group), thing in pairs if match_share(group, thing) > 0]


def _wanted(query: Query) -> list[tuple[int, Group]]:
    """Return every wanted thing as its group, with the group's number."""
    return [(index, group) for index, group in enumerate(query.groups) for _ in range(group.count)]


def _matching(query: Query, wanted: list, seen: tuple[Seen, ...]) -> tuple[dict[int, int], float]:
    """Return the best assignment wanted -> seen, and the sum of its matches."""
    if not seen:
        return {}, 0.0
    scores = np.array([[match_share(group, thing) for thing in seen] for _, group in wanted])
    return _assign(query, wanted, seen, scores)


def match_share(group: Group, thing: Seen) -> float:
    """Share of the named attributes that a seen thing has."""
    checks = [thing.shape == group.shape]
    if group.colour is not None:
        checks.append(thing.colour == group.colour)
    if group.size is not None:
        checks.append(thing.size == group.size)
    return sum(checks) / len(checks)


def _assign(query: Query, wanted: list, seen: tuple[Seen, ...], scores: np.ndarray) -> tuple[dict[int, int], float]:
    """The assignment wanted -> seen of the highest match; among equals, the one that fulfils the relations."""
    rows, columns = linear_sum_assignment(-scores)
    chosen, total = dict(zip(rows.tolist(), columns.tolist(), strict=True)), float(scores[rows, columns].sum())
    if query.relations and len(wanted) <= len(seen) <= 6:
        ties = [
            dict(enumerate(p))
            for p in permutations(range(len(seen)), len(wanted))
            if scores[range(len(wanted)), p].sum() > total - 1e-9
        ]
        chosen = max(
            ties, key=lambda c: sum(_related(query, r, wanted, seen, c) for r in query.relations), default=chosen
        )
    return chosen, total


def _related(
    query: Query, relation: tuple[int, str, int], wanted: list, seen: tuple[Seen, ...], chosen: dict[int, int]
) -> float:
    """1.0 when the things seen for the two groups stand in the relation and each has an attribute that was named."""
    a_group, name, b_group = relation
    firsts = [chosen[i] for i, (g, _) in enumerate(wanted) if g == a_group and i in chosen]
    seconds = [chosen[i] for i, (g, _) in enumerate(wanted) if g == b_group and i in chosen]
    if not firsts or not seconds:
        return 0.0
    if any(match_share(query.groups[a_group], seen[k]) == 0 for k in firsts) or any(
        match_share(query.groups[b_group], seen[k]) == 0 for k in seconds
    ):
        return 0.0
    return float(all(holds(name, _spot(seen[i]), _spot(seen[j])) for i in firsts for j in seconds))


def _spot(thing: Seen) -> tuple[float, float, float]:
    return thing.x, thing.y, thing.radius
