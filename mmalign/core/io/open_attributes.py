"""What an image shows where its prompt leaves a choice: the protocol of a reader.

`mmalign compare` counts the choices and reports their entropy, if a reader knows the prompts. A third party's reader
joins by an entry point, which names a class that satisfies `OpenAttributes`:

    [project.entry-points."mmalign.open_attributes"]
    street-scenes = "their_package.scenes:StreetReader"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8


class OpenAttributes(Protocol):
    """Reads from pixels what prompts do not say, such as the background."""

    kinds: Mapping[str, Sequence[str]]
    """attribute -> the values that it can have"""

    def __init__(self) -> None:
        """Make a reader; it takes no options."""

    def knows(self, prompts: Sequence[str], width: int, height: int) -> bool:
        """Tell whether all of these prompts, and images of this size in pixels, can be read."""

    def read(self, prompt: str, image: UInt8[np.ndarray, "height width 3"]) -> Mapping[str, Sequence[str]]:
        """Return the values that an image shows of each attribute that the prompt leaves open.

        An attribute of things has a value for each thing; one that the prompt decides has none, or is missing.
        """
