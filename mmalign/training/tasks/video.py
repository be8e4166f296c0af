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
        second = output / "transformer_2"
        experts = f'pipe.load_lora_weights("{second}", load_into_transformer_2=True)'
        return [
            *loading,
            *([experts] if lora and second.is_dir() else []),
            'frames = pipe("a prompt").frames[0]  # give height, width and num_frames as in the section video below',
        ]
