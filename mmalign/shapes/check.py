"""How often the oracle is right on scenes whose truth is known."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from mmalign.shapes.language import Query, groups_of
from mmalign.shapes.oracle import Reading, judge, read
from mmalign.shapes.world import QUALITIES, Scene, render, sample_scene


class Row(NamedTuple):
    """`right` of `scenes` of one kind, rendered in one quality, were read strictly right."""

    quality: str
    scene: str
    scenes: int
    right: int


def kind_of(scene: Scene) -> str:
    """The category of a scene: single, counting, positional or several."""
    groups = groups_of(scene)
    if len(scene.objects) == 1:
        return "single"
    if len(groups) == 1:
        return "counting"
    return "positional" if scene.relation else "several"


def read_right(scene: Scene, reading: Reading) -> bool:
    """Whether every object's shape, colour and size, their number, the relation and the background are right."""
    wanted = sorted((o.shape, o.colour, o.size) for o in scene.objects)
    seen = sorted((o.shape, o.colour, o.size) for o in reading.objects)
    relations = (scene.relation,) if scene.relation else ()
    query = Query(groups_of(scene), relations if len(groups_of(scene)) == 2 else (), scene.background)
    return wanted == seen and judge(query, reading) > 1.0 - 1e-6


def check_oracle(count: int, seed: int) -> list[Row]:
    """Read `count` fresh scenes (half of them crisp, held-out combinations included); one row per quality and kind."""
    rng = np.random.default_rng(seed)
    tally: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(count):
        scene = sample_scene(rng, crisp=0.5, held_out=True)
        right = read_right(scene, read(render(scene)))
        for kind in (kind_of(scene), "all"):
            tally[scene.quality.kind, kind].append(right)
            if scene.quality.kind != "crisp":
                tally["degraded (all kinds)", kind].append(right)
    order = [*QUALITIES, "degraded (all kinds)"]
    return [
        Row(q, k, len(v), sum(v))
        for (q, k), v in sorted(tally.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
