"""What captions of the Shapes world leave open, as the oracle reads it from images.

A background that is not named; the size and the colour of things where it is not named; the place, a cell of a 3 x 3
grid of the image, of things that stand in no relation. Things are assigned to the caption as for correctness, and
things that the caption does not ask for are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8

from mmalign.shapes import oracle
from mmalign.shapes.language import PromptError, parse
from mmalign.shapes.world import BACKGROUNDS, COLOURS, RADII, SIZE

_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


class ShapesOpenAttributes:
    """Reads images of the Shapes world.

    ```python
    ShapesOpenAttributes().read("a red circle", image)   # {"background": ["navy"], "size": ["large"], ...}
    ```
    """

    name: ClassVar[str] = "shapes"
    kinds: ClassVar[Mapping[str, Sequence[str]]] = {
        "background": tuple(BACKGROUNDS),
        "size": tuple(RADII),
        "place": tuple(f"{row} {column}" for row, column in product(_ROWS, _COLUMNS)),
        "colour": tuple(COLOURS),
    }

    def knows(self, prompts: Sequence[str], width: int, height: int) -> bool:
        """Tell whether the images are 64x64 and all prompts are of the grammar."""
        if (width, height) != (SIZE, SIZE):
            return False
        try:
            return all(parse(prompt) for prompt in prompts)
        except PromptError:
            return False

    def read(self, prompt: str, image: UInt8[np.ndarray, "64 64 3"]) -> dict[str, list[str]]:
        """Return the values of each attribute that the prompt leaves open."""
        query, reading = parse(prompt), oracle.read_cached(image)
        related = {index for first, _, second in query.relations for index in (first, second)}
        things = [(index, query.groups[index], thing) for index, thing in oracle.found_things(query, reading)]
        return {
            "background": [reading.background] if query.background is None else [],
            "size": [thing.size for _, group, thing in things if group.size is None],
            "place": [_cell(thing) for index, _, thing in things if index not in related],
            "colour": [thing.colour for _, group, thing in things if group.colour is None],
        }


def _cell(thing: oracle.Seen) -> str:
    row, column = (min(int(3 * max(at, 0.0) / SIZE), 2) for at in (thing.y, thing.x))
    return f"{_ROWS[row]} {_COLUMNS[column]}"
