"""Training video generators: as images, with the geometry of the section `video`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.core.resources import resolve_model
from mmalign.training.tasks.base import CardFacts
from mmalign.training.tasks.image import ImageTask
from pipelines.load import family_of


class VideoTask(ImageTask):
    """See the module."""

    unit = "videos"
    card = CardFacts(
        library="diffusers",
        pipeline_tag="text-to-video",
        all_weights="all weights of the denoiser",
        evaluation="Means over a few fixed prompts and seeds",
    )

    def pipeline_tag(self, base: str) -> str:
        """Return image-to-video for models that make videos of a first frame."""
        return "image-to-video" if _starts_from_image(base) else super().pipeline_tag(base)

    def usage(self, base: str, output: Path, *, lora: bool) -> Sequence[str]:
        """Load by diffusers alone."""
        *loading, _ = super().usage(base, output, lora=lora)
        second = output / "transformer_2"
        experts = f'pipe.load_lora_weights("{second}", load_into_transformer_2=True)'
        given = 'image, "a prompt"' if _starts_from_image(base) else '"a prompt"'
        return [
            *loading,
            *([experts] if lora and second.is_dir() else []),
            f"frames = pipe({given}).frames[0]  # give height, width and num_frames as in the section video below",
        ]


def _starts_from_image(base: str) -> bool:
    return family_of(resolve_model(base), resolve_model).needs_first_frame
