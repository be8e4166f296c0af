"""What video generators that start from an image share: its encoding becomes part of the conditioning."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent_video import LatentVideo


class FromFirstFrame(LatentVideo):
    """A video generator that is given the first frame of each video; a family says how it encodes it.

    >>> cond = generator.with_first_frame(generator.encode_prompts(["a cat runs"]), images)  # [1, 3, height, width]
    """

    takes_first_frame = True
    needs_first_frame = True

    @torch.no_grad()
    def encode_first_frames(self, frames: Float[Tensor, "images 3 height width"]) -> dict[str, Tensor]:
        """Return the fields of `Conditioning` that hold images in [0, 1] of the size of the model's frames.

        Raises:
            PipelineError: images of another shape.
        """
        _, *expected = self.media_shape
        if list(frames.shape[1:]) != expected:
            raise PipelineError(f"first frames of this model are {expected}, got {list(frames.shape[1:])}.")
        encoded = [self._encode_first(one) for one in frames.to(self.device).split(1)]
        return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}

    @abstractmethod
    def _encode_first(self, frames: Tensor) -> dict[str, Tensor]:
        """Encode one image of the right size, as a batch; for some families it becomes a whole video."""

    def with_first_frame(self, cond: Conditioning, frames: Float[Tensor, "images 3 height width"]) -> Conditioning:
        """Return the conditioning of videos that start with an image in [0, 1] each, or with one for all."""
        if len(frames) not in (1, len(cond)):
            raise PipelineError(
                f"give a first frame for each of {len(cond)} prompts, or one for all: got {len(frames)}."
            )
        encoded = self.encode_first_frames(frames)
        times = len(cond) // len(frames)
        return replace(cond, **{name: one.repeat_interleave(times, dim=0) for name, one in encoded.items()})

    def _first_frame(self, cond: Conditioning) -> Tensor:
        """Return the latents of the first frames."""
        if cond.first_frame is None:
            raise PipelineError(
                f"{self.name_or_path} makes videos of a first frame; give it by"
                " generator.with_first_frame(cond, images)."
            )
        return cond.first_frame
