"""Events of a video: a state for each frame, found from cuts between shots, and the clips between changes of state.

Frames of equal states show the same event. Runs of equal states are clips, and the number of different states is the
number of distinct events. TEMPLE (arXiv 2503.16929) finds both by a shot detector and an image encoder. Here cuts are
found by differences of small images; where the truth of a video is known, it gives the states instead.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

SHOT_CHANGE = 0.1
"""Mean difference of two small images, of a range of 1, from which they belong to different shots."""
_SIDE = 16


def shot_states(video: UInt8[Tensor, "frames 3 height width"]) -> list[Hashable]:
    """The number of the shot that each frame belongs to; a shot similar to an earlier one has its number.

    A new shot begins where an image of 16 x 16 pixels differs from the one before by `SHOT_CHANGE` or more on
    average; two shots are similar if their mean images differ by less.
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
