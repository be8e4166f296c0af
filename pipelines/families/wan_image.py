"""Wan 2.1 and 2.2, image to video: the network sees, beside the noisy latents, those of the first frame.

The convention is that of diffusers' ``WanImageToVideoPipeline``: the latents of a video that is grey after its first
frame, behind a mask of one channel a frame of a latent (1 where the frame is given), follow the noisy channels. Wan
2.1's attends to CLIP's hidden states of the frame, too. (TI2V 5B, which takes the frame otherwise, is in ``wan.py``.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.components import has_component
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.first_frame import FromFirstFrame
from pipelines.families.wan import Wan, WanExperts, WanPerToken
from pipelines.generator import Generator

GREY = 0.5


class WanFromImage(FromFirstFrame, Wan):
    """Wan 2.1 and 2.2, image to video."""

    @classmethod
    def variant(cls, index: dict[str, Any]) -> type[Generator]:
        """Return the class of a model with a time for each token, with CLIP, of two experts or of one."""
        if index.get("expand_timesteps"):
            return WanPerTokenFromImage
        if has_component(index, "image_encoder"):
            return WanFromImageWithClip
        return WanExpertsFromImage if has_component(index, "transformer_2") else cls

    @property
    def network_channels(self) -> int:
        """Channels of the noisy latents, as far as the network's configuration leaves room for the first frame."""
        return int(self.config["in_channels"]) - self.frame_step - self.latent_channels

    def _encode_first(self, frames: Tensor) -> dict[str, Tensor]:
        count, _, height, width = self.media_shape
        media = frames.new_full((len(frames), count, 3, height, width), GREY)
        media[:, 0] = frames
        return {"first_frame": self.encode(media)}

    def _inputs(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        latents = self._first_frame(cond).to(x_t)
        mask = latents.new_zeros(len(latents), self.frame_step, *latents.shape[2:])
        mask[:, :, 0] = 1.0
        return torch.cat([x_t, mask, latents], dim=1)


class WanExpertsFromImage(WanFromImage, WanExperts):
    """The same of two experts: Wan 2.2 I2V A14B."""


class WanFromImageWithClip(WanFromImage):
    """Wan 2.1 I2V 14B: the network attends to CLIP's hidden states of the first frame beside the text."""

    vae_names = ("vae", "image_encoder", "image_processor")

    def _check_channels(self) -> None:
        super()._check_channels()
        if not self.config.get("image_dim") or self.config.get("pos_embed_seq_len"):
            raise PipelineError(
                f"the transformer of {self.name_or_path} takes no image embeddings, or those of a last frame too,"
                " which is not supported; use Wan 2.1 I2V."
            )

    def _encode_first(self, frames: Tensor) -> dict[str, Tensor]:
        pictures = [frame.permute(1, 2, 0) for frame in (frames * 255).round().to("cpu", torch.uint8)]
        pixels = self.encoder("image_processor")([one.numpy() for one in pictures], return_tensors="pt").pixel_values
        encoder = self.encoder("image_encoder")
        states = encoder(pixels.to(self.device, encoder.dtype), output_hidden_states=True).hidden_states
        return {**super()._encode_first(frames), "image_embeds": states[-2]}

    def _beside(self, cond: Conditioning) -> dict[str, Tensor]:
        assert cond.image_embeds is not None, "they come with the first frame"
        return {"encoder_hidden_states_image": cond.image_embeds.to(self.dtype)}


class WanPerTokenFromImage(WanPerToken):
    """Wan 2.2 TI2V 5B saved as an image-to-video pipeline: videos always start from an image."""

    needs_first_frame = True
