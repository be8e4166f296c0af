"""Training video generators: as images, with the geometry of the section `video`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.training.tasks.base import CardFacts
from mmalign.training.tasks.image import ImageTask


class VideoTask(ImageTask):
    """See the module."""

    unit = "videos"
    card = CardFacts(
        library="diffusers",
        pipeline_tag="text-to-video",
        all_weights="all weights of the denoiser",
        evaluation="Means over a few fixed prompts and seeds",
    )

    def usage(self, base: str, output: Path, *, lora: bool) -> Sequence[str]:
        """Load by diffusers alone."""
        *loading, _ = super().usage(base, output, lora=lora)
        return [
            *loading,
            'frames = pipe("a prompt").frames[0]  # give height, width and num_frames as in the section video below',
        ]
