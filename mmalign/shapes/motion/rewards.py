"""The oracle of moving Shapes as rewards, registered by entry points like any third party's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.shapes.motion import judge
from mmalign.shapes.motion.language import MotionQuery, parse
from mmalign.shapes.motion.oracle import ClipReading, read_cached
from mmalign.shapes.motion.tracks import LASTING
from mmalign.shapes.rewards import check_grammar
from mmalign.shapes.world import SIZE
from rewards import Reward
from rewards.errors import RewardError


class ClipReward(Reward):
    """Base of the rewards that read clips of moving Shapes, `[B, F, 3, 64, 64]`."""

    modality = "video"
    range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "none: computed by mmalign.shapes.motion.oracle"
    fixed_size = SIZE
    least_frames = LASTING
    needs = frozenset({"prompts"})
    grade: ClassVar[staticmethod[[MotionQuery, ClipReading], float]]
    """Grades one clip against its prompt."""

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        """Refuse prompts outside the grammar."""
        if "prompts" in cls.needs:
            check_grammar(cls, prompts, parse)

    def readings(self, media: Float[Tensor, "batch frames 3 height width"]) -> list[ClipReading]:
        """Read each clip once."""
        if media.shape[-2:] != (SIZE, SIZE) or media.shape[1] < self.least_frames:
            frames, (height, width) = media.shape[1], media.shape[-2:]
            raise RewardError(
                f"{self.name} reads clips of moving Shapes, {self.least_frames} or more frames of {SIZE}x{SIZE}; "
                f"got {frames} of {height}x{width}"
            )
        pixels = (media.permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8).cpu().numpy()
        return [read_cached(clip) for clip in pixels]

    def score(self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> Tensor:
        """Grade each clip against its prompt."""
        readings = self.readings(media)
        return torch.tensor([float(self.grade(parse(p), r)) for p, r in zip(prompts or (), readings, strict=True)])


class ShapesVideoCorrectness(ClipReward):
    """How well the frames show the things of the prompt, whatever they do: the mean grade of a frame."""

    name: ClassVar[str] = "shapes-video-correctness"
    grade = staticmethod(judge.correctness)


class ShapesVideoMotion(ClipReward):
    """How well the things do what the prompt says: direction, speed, event, order, and nothing else."""

    name: ClassVar[str] = "shapes-video-motion"
    grade = staticmethod(judge.motion)


class ShapesVideoStrict(ClipReward):
    """1 if the clip shows exactly the things of the prompt, each doing exactly what it should, otherwise 0."""

    name: ClassVar[str] = "shapes-video-strict"
    derived_from = frozenset({"shapes-video-correctness", "shapes-video-motion"})
    grade = staticmethod(judge.is_strict)


class ShapesVideoSmoothness(ClipReward):
    """Whether nothing jumps between frames but what the prompt asks for: shape, colour, place, size, presence."""

    name: ClassVar[str] = "shapes-video-smoothness"
    grade = staticmethod(judge.smoothness)


class ShapesVideoDynamic(ClipReward):
    """How much happens, in pixels a frame, whatever the prompt: speed, growth, new colours and things."""

    name: ClassVar[str] = "shapes-video-dynamic"
    range = (0.0, float("inf"))
    needs = frozenset()

    def score(self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> Tensor:
        """Measure each clip; the prompt is not used."""
        return torch.tensor([judge.dynamic_degree(clip) for clip in self.readings(media)])
