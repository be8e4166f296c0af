"""The Shapes world: scenes of one to four coloured shapes, drawn at 64x64 with exact antialiasing.

A :class:`Scene` is the ground truth; :func:`render` turns it into pixels with signed distance functions (so nothing
depends on a drawing library's version), and :func:`sample_scene` draws a random scene from a seeded generator. Render
quality (crisp, blurred, noisy, washed out) is part of the scene but never of its caption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
from scipy import ndimage

SIZE = 64
"""Side of an image in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 215, 40),
    "purple": (140, 45, 175),
    "orange": (245, 130, 25),
    "cyan": (60, 205, 225),
    "pink": (250, 135, 195),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (18, 18, 18), "gray": (130, 130, 130), "navy": (18, 24, 75)}
RADII = {"small": (8.0, 9.0), "large": (12.0, 13.5)}
"""Radius range of each size, in pixels."""
RELATIONS = ("left of", "right of", "above", "below", "next to")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "next to": "next to"}
QUALITIES = ("crisp", "blurred", "noisy", "low contrast")

HELD_OUT_OBJECTS = frozenset(
    {
        ("red", "star"),
        ("green", "ring"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("orange", "square"),
    }
)
"""(colour, shape) combinations in no training scene; the prompts of category `Conflicting` contain them."""
HELD_OUT_RELATIONS = frozenset(
    {
        ("star", "left of", "ring"),
        ("circle", "above", "cross"),
        ("square", "right of", "triangle"),
        ("ring", "below", "circle"),
    }
)
"""(shape, relation, shape) combinations in no training scene, in either reading direction."""

_MIN_GAP, _MARGIN, _NEXT_TO_GAP = 3.0, 1.0, 9.0


@dataclass(frozen=True)
class Object:
    """One shape: its kind, colour name, size name, centre (x right, y down) and radius in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Quality:
    """How the scene is rendered: the kind and its strength in [0, 1] (0 is the mildest of that kind)."""

    kind: str = "crisp"
    strength: float = 0.0


@dataclass(frozen=True)
class Scene:
    """The content of an image. `relation` is (index, relation, index) when the scene was composed around one."""

    objects: tuple[Object, ...]
    background: str
    relation: tuple[int, str, int] | None = None
    quality: Quality = field(default_factory=Quality)
    noise_seed: int = 0


def coverage(shape: str, radius: float, x: float, y: float, size: int = SIZE) -> np.ndarray:
    """Fraction of each pixel that the shape covers, `[size, size]` float32 in [0, 1]."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    px, py = axis[None, :] - np.float32(x), axis[:, None] - np.float32(y)
    return np.clip(0.5 - _DISTANCE[shape](px, py, np.float32(radius)), 0.0, 1.0)


def _circle(px: np.ndarray, py: np.ndarray, r: np.float32) -> np.ndarray:
    return np.hypot(px, py) - r


def _box(px: np.ndarray, py: np.ndarray, half_width: np.float32, half_height: np.float32) -> np.ndarray:
    dx, dy = np.abs(px) - half_width, np.abs(py) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(px: np.ndarray, py: np.ndarray, r: np.float32) -> np.ndarray:
    return _box(px, py, 0.86 * r, 0.86 * r)


def _ring(px: np.ndarray, py: np.ndarray, r: np.float32) -> np.ndarray:
    return np.abs(np.hypot(px, py) - 0.74 * r) - 0.26 * r


def _cross(px: np.ndarray, py: np.ndarray, r: np.float32) -> np.ndarray:
    return np.minimum(_box(px, py, r, 0.33 * r), _box(px, py, 0.33 * r, r))


def _polygon(corners: np.ndarray) -> Callable[[np.ndarray, np.ndarray, np.float32], np.ndarray]:
    """Exact signed distance to a closed polygon with unit-radius `corners` `[N, 2]` (x right, y down)."""

    def distance(px: np.ndarray, py: np.ndarray, r: np.float32) -> np.ndarray:
        shape = np.broadcast_shapes(px.shape, py.shape)
        px, py = np.broadcast_to(px, shape), np.broadcast_to(py, shape)
        nearest, inside = np.full(shape, np.inf, np.float32), np.zeros(shape, bool)
        for (ax, ay), (bx, by) in zip(corners * r, np.roll(corners, -1, 0) * r, strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, px - ax, py - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - along * ex) ** 2 + (wy - along * ey) ** 2)
            crosses = (ay > py) != (by > py)
            inside ^= crosses & (px < ax + (py - ay) * ex / (ey if ey else 1.0))
        return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)

    return distance


def _on_circle(degrees: list[float], radii: list[float]) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.stack([np.sin(angle) * radii, -np.cos(angle) * radii], 1).astype(np.float32)


_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon(_on_circle([0, 120, 240], [1.1] * 3)),
    "star": _polygon(_on_circle([36 * k for k in range(10)], [1.1, 0.47] * 5)),
    "ring": _ring,
    "cross": _cross,
}


def render(scene: Scene) -> np.ndarray:
    """Draw `scene`: `[64, 64, 3]` uint8 RGB. The same scene always gives the same bytes."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        alpha = coverage(item.shape, item.radius, item.x, item.y)[..., None]
        image += alpha * (np.asarray(COLOURS[item.colour], np.float32) - image)
    return degrade(image, scene.quality, scene.noise_seed)


def degrade(image: np.ndarray, quality: Quality, noise_seed: int = 0) -> np.ndarray:
    """Apply a render quality to `[H, W, 3]` values in [0, 255]; returns uint8."""
    strength = quality.strength
    if quality.kind == "blurred":
        image = ndimage.gaussian_filter(image, (1.0 + 0.8 * strength,) * 2 + (0,), mode="nearest")
    elif quality.kind == "noisy":
        noise = np.random.default_rng(noise_seed).standard_normal(image.shape, np.float32)
        image = image + (14.0 + 16.0 * strength) * noise
    elif quality.kind == "low contrast":
        image = 128.0 + (0.65 - 0.25 * strength) * (image - 128.0)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def holds(relation: str, a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether `a` stands in `relation` to `b`; each is (x, y, radius) in pixels.

    Directions are the dominant axis of the offset between centres; `next to` is a gap of at most 12 px.
    """
    dx, dy = b[0] - a[0], b[1] - a[1]
    if relation == "next to":
        return float(np.hypot(dx, dy)) - a[2] - b[2] <= _NEXT_TO_GAP + 3.0
    ahead, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead > 4.0 and ahead >= 0.9 * abs(across)


def _clearly_holds(relation: str, a: Object, b: Object) -> bool:
    """The relation with a margin, so that a drawn scene is never ambiguous to a reader of :func:`holds`."""
    dx, dy = b.x - a.x, b.y - a.y
    if relation == "next to":
        return float(np.hypot(dx, dy)) - a.radius - b.radius <= _NEXT_TO_GAP
    ahead, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead > 8.0 and ahead >= 1.3 * abs(across)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination kept out of every training set."""
    if any((item.colour, item.shape) in HELD_OUT_OBJECTS for item in scene.objects):
        return True
    for a, b in permutations(scene.objects, 2):
        for relation in RELATIONS[:4]:
            if (a.shape, relation, b.shape) in HELD_OUT_RELATIONS:
                if holds(relation, (a.x, a.y, a.radius), (b.x, b.y, b.radius)):
                    return True
    return False


def sample_scene(rng: np.random.Generator, *, crisp: float = 0.65, held_out: bool = False) -> Scene:
    """Draw a random scene; `crisp` is the share of undegraded images.

    Without `held_out` the scene never shows a held-out combination (training data); with it, any combination may
    occur.
    """
    while True:
        scene = _compose(rng, crisp)
        if scene is not None and (held_out or not is_held_out(scene)):
            return scene


def _compose(rng: np.random.Generator, crisp: float) -> Scene | None:
    kind = rng.choice(["single", "count", "two", "relation", "many"], p=[0.28, 0.24, 0.16, 0.24, 0.08])
    relation = None
    if kind == "count":
        kinds = [random_kind(rng)] * int(rng.integers(2, 5))
    else:
        number = {"single": 1, "two": 2, "relation": 2, "many": int(rng.integers(3, 5))}[str(kind)]
        kinds = [random_kind(rng) for _ in range(number)]
        if len({k[:2] for k in kinds}) < number:
            return None
    if kind == "relation":
        relation = (0, str(rng.choice(RELATIONS)), 1)
    objects = place(rng, kinds, relation)
    if objects is None:
        return None
    quality = Quality()
    if rng.random() >= crisp:
        quality = Quality(str(rng.choice(QUALITIES[1:])), float(rng.random()))
    return Scene(objects, str(rng.choice(list(BACKGROUNDS))), relation, quality, int(rng.integers(2**31)))


def random_kind(rng: np.random.Generator) -> tuple[str, str, str]:
    """(shape, colour, size), each equally likely."""
    return str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), str(rng.choice(list(RADII)))


def inside(thing: Object) -> bool:
    """Whether the whole shape lies in the image, with the margin that :func:`place` keeps."""
    low = _MARGIN + 1.1 * thing.radius
    return low <= thing.x <= SIZE - low and low <= thing.y <= SIZE - low


def place(
    rng: np.random.Generator, kinds: list[tuple[str, str, str]], relation: tuple[int, str, int] | None = None
) -> tuple[Object, ...] | None:
    """Put objects of the given (shape, colour, size) where they do not touch; None when no room was found."""
    for _ in range(60):
        objects: list[Object] = []
        for shape, colour, size in kinds:
            radius = float(rng.uniform(*RADII[size]))
            low, high = _MARGIN + 1.1 * radius, SIZE - _MARGIN - 1.1 * radius
            for _ in range(12):
                x, y = (float(v) for v in rng.uniform(low, high, 2))
                if all(np.hypot(x - o.x, y - o.y) > 1.06 * (radius + o.radius) + _MIN_GAP for o in objects):
                    objects.append(Object(shape, colour, size, x, y, radius))
                    break
            else:
                break
        if len(objects) == len(kinds):
            if relation is None or _clearly_holds(relation[1], objects[relation[0]], objects[relation[2]]):
                return tuple(objects)
    return None
