"""What goes on in a video, frame by frame: from its scene graph, or cheaply from how far its pictures differ.

A list of *states*, one a frame: frames of equal states show the same going on. Runs of equal states are clips, and the
number of different states is the number of distinct events. TEMPLE (arXiv 2503.16929) finds both by a shot detector
and an image encoder; small pictures and their differences do it here, as far as cuts between shots go.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from mmalign.shapes.video import Sighting, Track

SHOT_CHANGE = 0.1
"""Mean difference of two small pictures, of a range of 1, from which they belong to different shots."""
_SIDE = 16


def scene_states(tracks: Sequence[Track], size: int) -> list[Hashable]:
    """What every shape does in each frame: hidden or not, its colour, the signs of its motion and growth.

    The picture is `size` wide and wraps around. A frame takes its motion towards the next one that shows the shape,
    the last one from the frame before.
    """
    return list(zip(*(_doings(track, size) for track in tracks), strict=True))


def _doings(track: Track, size: int) -> list[Hashable]:
    doings: list[Hashable] = []
    for index, now in enumerate(track):
        if now is None:
            doings.append(None)
            continue
        after = track[index + 1] if index + 1 < len(track) else None
        before = track[index - 1] if index else None
        change = _change(now, after, size) if after else _change(before, now, size) if before else (0, 0, 0)
        doings.append((now.colour, *change))
    return doings


def _change(first: Sighting, second: Sighting, size: int) -> tuple[int, int, int]:
    """Signs of the step in x and y, the short way round, and of the growth."""
    steps = [(b - a + size / 2) % size - size / 2 for a, b in ((first.x, second.x), (first.y, second.y))]
    across, down, growth = (int(np.sign(round(value, 6))) for value in (*steps, second.radius - first.radius))
    return across, down, growth


def shot_states(video: UInt8[Tensor, "frames 3 height width"]) -> list[Hashable]:
    """The number of the shot that each frame belongs to; a shot that looks like an earlier one has its number.

    A new shot begins where a picture of 16 x 16 pixels differs from the one before by `SHOT_CHANGE` or more on
    average; two shots look alike if their mean pictures differ by less.
    """
    small = F.interpolate(video.float() / 255, size=(_SIDE, _SIDE), mode="area")
    cuts = (small[1:] - small[:-1]).abs().mean((1, 2, 3)) >= SHOT_CHANGE
    shots = small.split(clip_lengths([0, *cuts.long().cumsum(0).tolist()]))
    known: list[Tensor] = []
    states: list[Hashable] = []
    for shot in shots:
        look = shot.mean(0)
        alike = (index for index, other in enumerate(known) if float((look - other).abs().mean()) < SHOT_CHANGE)
        number = next(alike, len(known))
        if number == len(known):
            known.append(look)
        states += [number] * len(shot)
    return states


def clip_lengths(states: Sequence[Hashable]) -> list[int]:
    """The lengths of the runs of equal states, in order."""
    return [len(list(run)) for _, run in groupby(states)]


def clips(video: Tensor, states: Sequence[Hashable]) -> list[Tensor]:
    """Cut a video `[frames, ...]` where its state changes."""
    return list(video.split(clip_lengths(states)))
