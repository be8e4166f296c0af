"""Clips as a video model takes them: its number of frames, at its rate, from the start of a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.io.decode import decode_video

SAME_RATE = 0.01
"""Rates that differ by less than this share are one rate: 23.976 and 24 frames a second."""


@dataclass(frozen=True)
class ClipSource:
    """What a file holds: number of frames, frames a second (None: unknown), width and height in pixels."""

    frames: int
    fps: float | None
    width: int
    height: int


@dataclass
class ClipRule:
    """Which frames are taken: the first `frames`, at `fps` a second where the file has more; None: at its own rate.

    No frame is taken twice, so a clip with fewer frames a second than `fps` keeps its own and plays faster.

    >>> ClipRule(5, 8.0).choose(100, 24.0)
    [0, 3, 6, 9, 12]
    >>> ClipRule(5, 8.0).choose(100, 4.0)
    [0, 1, 2, 3, 4]
    """

    frames: int
    fps: float | None = None
    seen: tuple[int, float | None] = field(default=(0, None), compare=False)
    """The frames and the rate of the last clip."""

    def choose(self, total: int, rate: float | None) -> list[int]:
        """Return the numbers of the frames taken, of `total` at `rate` frames a second (None: unknown).

        Raises:
            UserError: there are too few.
        """
        self.seen = (total, rate)
        step = self.step(rate)
        wanted = [int(index * step + 1e-6) for index in range(self.frames)]
        if wanted[-1] >= total:
            thinned = f", {int((total - 1) / step) + 1} at {self.fps:g} a second" if step > 1 else ""
            raise UserError(
                f"holds {total} frames{thinned}, and the model takes {self.frames}; give longer clips, or fewer"
                " video.frames"
            )
        return wanted

    def step(self, rate: float | None) -> float:
        """Return how many frames of a clip one frame taken stands for, at least 1."""
        if not rate or not self.fps or rate <= self.fps * (1 + SAME_RATE):
            return 1.0
        return rate / self.fps


def read_clip(
    media: bytes | Path, rule: ClipRule, fps: float | None = None
) -> tuple[UInt8[Tensor, "frames 3 height width"], ClipSource]:
    """Return the frames that `rule` takes, as 8-bit RGB, and what the file holds.

    `media` is a video file (PyAV), an animation, or a folder of frames; `fps` is the rate of one that does not state
    it, or states it wrongly.

    Raises:
        UserError: too few frames. PIL and PyAV raise errors of their own for what they cannot read.
    """
    own = ClipRule(rule.frames, rule.fps)  # a rule remembers its last clip, and clips are read by several threads
    levels, _ = decode_video(media, own, fps)
    (total, rate), (height, width) = own.seen, levels.shape[-2:]
    return levels, ClipSource(total, rate, width, height)


def clip_changes(sources: Iterable[ClipSource], rule: ClipRule) -> list[str]:
    """Return, in words, how many clips lost frames or changed their speed when `rule` took its frames."""
    found: Counter[str] = Counter()
    own = rule.fps
    for source in sources:
        step = rule.step(source.fps)
        found[f"thinned to {own:g} frames a second"] += step > 1
        found["without a rate, taken as the model's"] += source.fps is None
        slow = source.fps is not None and own is not None and source.fps < own * (1 - SAME_RATE)
        found[f"of fewer than {own:g} frames a second, which the model plays faster"] += slow
        found[f"cut to the first {rule.frames / (own or 1):g} s"] += math.ceil(source.frames / step) > rule.frames
    return [f"{count} {what}" for what, count in found.items() if count]
