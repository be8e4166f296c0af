"""Positions of tokens on three axes (time, height, width), as the Qwen-VL models were trained with them.

They are computed here because releases of transformers disagree. 5.3 to 5.5 place videos wrongly. Those up to 5.16.1
cut the seconds between frames to whole ones. All from 5.3 on start the text after a video that is longer than wide
before the end of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Types of tokens."""


class Grid(NamedTuple):
    """The features of an image or video in the language model: the time of each frame, and rows and columns."""

    times: tuple[int, ...]
    height: int
    width: int

    @property
    def features(self) -> int:
        """The number of features."""
        return len(self.times) * self.height * self.width


def grid_positions(
    types: Int[Tensor, " tokens"], images: Sequence[Grid] = (), videos: Sequence[Grid] = ()
) -> Int[Tensor, "3 tokens"]:
    """Return the position of every token of one sample: time, height and width.

    A text token has the same position on all axes. A grid starts at the position after the token before it, on every
    axis. The token after a grid has the grid's largest position plus one (arXiv 2409.12191, figure 3), as in vLLM and
    in transformers before 5.3. `types` are 0 for text, 1 for features of images and 2 for those of videos, whose grids
    come in order:

        grid_positions(torch.tensor([0, 2, 2, 2, 0]), videos=[Grid((0, 1, 2), 1, 1)])
        # [[0, 1, 2, 3, 4], [0, 1, 1, 1, 4], [0, 1, 1, 1, 4]]
    """
    grids = {IMAGE: iter(images), VIDEO: iter(videos)}
    kinds, parts, at, start = types.tolist(), [], 0, 0
    while at < len(kinds):
        if kinds[at] == TEXT:
            length = next((ahead for ahead, kind in enumerate(kinds[at:]) if kind != TEXT), len(kinds) - at)
            part = torch.arange(length).expand(3, -1) + start
        else:
            grid = next(grids[kinds[at]])
            axes = torch.tensor(grid.times), torch.arange(grid.height), torch.arange(grid.width)
            part = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + start
        parts.append(part)
        at, start = at + part.shape[1], int(part.max()) + 1
    return torch.cat(parts, 1) if parts else torch.zeros(3, 0, dtype=torch.long)
