"""Wan 2.2 image to video: the network sees, beside the noisy latents, those of the first frame and where it is.

The convention is that of diffusers' ``WanImageToVideoPipeline``: the latents of a video that is grey after its first
frame, behind a mask of one channel a frame of a latent (1 where the frame is given), follow the noisy channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.components import has_component
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.wan import Wan, WanExperts
from pipelines.generator import Generator

GREY = 0.5


class WanFromImage(Wan):
    """Wan 2.2, image to video (I2V A14B); from Python alone."""

    needs_first_frame = True

    @classmethod
    def variant(cls, index: dict[str, Any]) -> type[Generator]:
        """Return the class of a model of one or two experts; refuses those that take the first frame otherwise."""
        otherwise = "CLIP's embeddings of it" if has_component(index, "image_encoder") else "it in place of latents"
        if index.get("expand_timesteps") or has_component(index, "image_encoder"):
            raise PipelineError(
                f"this image-to-video model takes {otherwise}, which is not supported; use Wan 2.2 I2V A14B, or a"
                " text-to-video model."
            )
        return WanExpertsFromImage if has_component(index, "transformer_2") else cls

    @property
    def network_channels(self) -> int:
        """Channels of the noisy latents, as far as the network's configuration leaves room for the first frame."""
        return int(self.config["in_channels"]) - self.frame_step - self.latent_channels

    @torch.no_grad()
    def with_first_frame(self, cond: Conditioning, frames: Float[Tensor, "images 3 height width"]) -> Conditioning:
        """Return the conditioning of videos that start with an image in [0, 1] each, or with one for all."""
        if len(frames) not in (1, len(cond)):
            raise PipelineError(
                f"give a first frame for each of {len(cond)} prompts, or one for all: got {len(frames)}."
            )
        count, _, height, width = self.media_shape
        if frames.shape[1:] != (3, height, width):
            raise PipelineError(
                f"first frames of this model are [3, {height}, {width}], got {list(frames.shape[1:])}."
            )
        media = torch.full((len(frames), count, 3, height, width), GREY)
        media[:, 0] = frames
        latents = self.encode(media)
        mask = latents.new_zeros(len(latents), self.frame_step, *latents.shape[2:])
        mask[:, :, 0] = 1.0
        given = torch.cat([mask, latents], dim=1)
        return replace(cond, first_frame=given if len(given) == len(cond) else given.repeat_interleave(len(cond), 0))

    def _inputs(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        if cond.first_frame is None:
            raise PipelineError(
                f"{self.name_or_path} makes videos of a first frame; give it by"
                " generator.with_first_frame(cond, images)."
            )
        return torch.cat([x_t, cond.first_frame.to(x_t.dtype)], dim=1)


class WanExpertsFromImage(WanFromImage, WanExperts):
    """The same of two experts."""
