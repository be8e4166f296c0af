"""Motion in videos: VBench's dynamic degree by RAFT, and smoothness by a frame interpolator of the user's choice.

Sources: Huang et al. 2024, "VBench" (arXiv:2311.17982), section 3, and its evaluation code; Teed and Deng 2020, "RAFT"
(arXiv:2003.12039). VBench's motion smoothness interpolates with AMT-S (Li et al. 2023), whose network is not ported
here; whoever has it can give it as the interpolator. With another one the score is not VBench's, and is not so called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.weights import load_state, read_state
from rewards.base import Reward
from rewards.errors import RewardError
from rewards.vbench import VBenchReward

Interpolator = Callable[[Tensor, Tensor], Tensor]
UPDATES = 20
PAIRS_AT_ONCE = 8
LEAST_SIDE, MULTIPLE = 128, 8
RATE = 8.0
FASTEST = 0.05
THRESHOLD, SIDE = 6.0, 256.0


class DynamicDegree(VBenchReward):
    """1 where enough frames of a video move fast, else 0, by the optical flow of RAFT.

    A pair of neighbouring frames moves where the fastest 5 % of its pixels move by more than 6 pixels on average, in a
    frame whose shorter edge has 256; a quarter as many pairs as there are frames must. media_fps: frames per second of
    the videos given, of which about 8 a second are looked at; below 8 the threshold grows. weights: a file of
    torchvision's raft_large, by default its C_T_V1, converted from the authors' raft-things. Frames have at least 128
    pixels a side.
    """

    name: ClassVar[str] = "vbench-dynamic-degree"
    dimension = "dynamic degree"
    version = "RAFT"
    differentiable = False
    range = (0.0, 1.0)
    licence = "Apache-2.0 (VBench), BSD-3-Clause (RAFT, torchvision)"
    source = "torchvision raft_large, C_T_V1"
    least_frames = 3

    def __init__(
        self, *, weights: str | PathLike[str] | None = None, media_fps: int | float = RATE, **options: Any
    ) -> None:
        """Load RAFT."""
        super().__init__(**options)
        if not media_fps > 0:
            raise RewardError(f"{self.name}: media_fps is {media_fps}; give the frames per second of the videos")
        self.media_fps = float(media_fps)
        self.source = self.source if weights is None else str(weights)
        self.model = _load_raft(weights).to(self.device, self.dtype)

    def measure(self, media: Tensor, prompts: Sequence[str] | None) -> Float[Tensor, " batch"]:
        """Return 1 where enough pairs of frames move."""
        frames = media[:, :: max(1, round(self.media_fps / RATE))]
        count = frames.shape[1]
        if count < self.least_frames:
            raise RewardError(
                f"{self.name}: {media.shape[1]} frames at {self.media_fps:g} per second leave {count} at 8 per "
                "second; at "
                f"least {self.least_frames} are needed"
            )
        threshold = max(1.0, RATE / self.media_fps) * THRESHOLD * min(frames.shape[-2:]) / SIDE
        moving = (self.speeds(frames) > threshold).sum(1)
        return (moving >= round(4 * (count / 16))).to(media.dtype)

    def speeds(self, frames: Float[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch pairs"]:
        """Return the mean motion of the fastest 5 % of the pixels from each frame to the next, in pixels."""
        if min(frames.shape[-2:]) < LEAST_SIDE:
            raise RewardError(
                f"{self.name}: frames of {frames.shape[-2]} x {frames.shape[-1]} pixels; RAFT needs at least "
                f"{LEAST_SIDE} per side"
            )
        padded = _pad(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        pairs = (padded[:, :-1].flatten(0, 1), padded[:, 1:].flatten(0, 1))
        chunks = zip(*(half.split(PAIRS_AT_ONCE) for half in pairs), strict=True)
        lengths = torch.cat([self.flow(*chunk).norm(dim=1).flatten(1) for chunk in chunks])
        fastest = lengths.topk(int(lengths.shape[1] * FASTEST), dim=1).values
        return fastest.mean(1).unflatten(0, (len(frames), -1))

    def flow(
        self, first: Float[Tensor, "pairs 3 height width"], second: Float[Tensor, "pairs 3 height width"]
    ) -> Float[Tensor, "pairs 2 height width"]:
        """Return the optical flow between frames in [0, 1], in pixels, after 20 updates."""
        first, second = ((2 * half - 1).to(self.dtype) for half in (first, second))
        return self.model(first, second, num_flow_updates=UPDATES)[-1].to(
            torch.promote_types(self.dtype, torch.float32)
        )


class MotionSmoothness(Reward):
    """One minus the mean error with which an interpolator predicts every second frame of a video; in [0, 1].

    interpolator: a function or module, or where it is, as `"module.path:name"`: it takes the frames before and after,
    both `[B, 3, H, W]` in [0, 1], and returns the one between. It runs where and in the dtype in which the videos are
    given; its own name becomes part of `version`. With AMT-S this is VBench's motion smoothness, before its
    normalisation; videos have at least 3 frames, and of an even number the last is not looked at.
    """

    name: ClassVar[str] = "motion-smoothness"
    modality = "video"
    differentiable = True
    range = (0.0, 1.0)
    licence = "none of its own; interpolator: its own"
    source = "its interpolator"
    citation = "Huang et al. 2024, VBench, arXiv:2311.17982"
    least_frames = 3

    def __init__(self, *, interpolator: Any, batch_size: int = 4, **options: Any) -> None:
        """Find the interpolator."""
        super().__init__(batch_size=batch_size, **options)
        self.interpolator: Interpolator = _imported(interpolator) if isinstance(interpolator, str) else interpolator
        if not callable(self.interpolator):
            raise RewardError(
                f"motion-smoothness: interpolator {interpolator!r} is not callable; give a function or module"
            )
        if isinstance(self.interpolator, nn.Module):
            self.interpolator.to(self.device)
        name = getattr(interpolator, "__qualname__", type(interpolator).__name__)
        self.version = interpolator if isinstance(interpolator, str) else str(name)

    def score(
        self,
        media: Float[Tensor, "batch frames 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare odd frames with those interpolated between even ones."""
        if media.shape[1] < self.least_frames:
            raise RewardError(f"motion-smoothness: a video of {media.shape[1]} frames; at least 3 are needed")
        even = media[:, ::2]
        true = media[:, 1 : 2 * even.shape[1] - 2 : 2]
        guessed = self.interpolator(even[:, :-1].flatten(0, 1), even[:, 1:].flatten(0, 1))
        if guessed.shape != true.flatten(0, 1).shape:
            raise RewardError(
                f"motion-smoothness: the interpolator returned {list(guessed.shape)} for frames "
                f"{list(true.flatten(0, 1).shape)}"
            )
        guessed = guessed.to(media.dtype).clamp(0, 1).unflatten(0, true.shape[:2])
        return 1 - (true - guessed).abs().flatten(1).mean(1)


def _pad(frames: Tensor) -> Tensor:
    """Pad both sides by repeating the border until they are multiples of 8."""
    down, across = (-side % MULTIPLE for side in frames.shape[-2:])
    return F.pad(frames, (across // 2, math.ceil(across / 2), down // 2, math.ceil(down / 2)), mode="replicate")


def _load_raft(weights: str | PathLike[str] | None) -> Any:
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    model = raft_large(weights=None, progress=False)
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise RewardError(f"weights {str(weights)!r}: no such file; give torchvision's raft_large, C_T_V1")
        load_state(model, read_state(path), path)
        return model
    published = Raft_Large_Weights.C_T_V1
    try:
        state = published.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, or a damaged file
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"cannot fetch {published.url}: {reason}; or give weights=PATH of a copy") from error
    load_state(model, state, published.url)
    return model


def _imported(target: str) -> Interpolator:
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"motion-smoothness: interpolator {target!r}: {error}; write 'module.path:name'") from error
