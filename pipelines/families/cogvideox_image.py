"""CogVideoX 5B I2V and 1.5 5B I2V: the network sees, beside the noisy latents, those of the first frame.

The convention is that of diffusers' ``CogVideoXImageToVideoPipeline``: the latents of the image are those of the first
latent frame of as many channels again, the others are zeros. 1.5 divides them by the autoencoder's scale where
``invert_scale_latents`` says so, and has an embedding of a constant, ``ofs``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.cogvideox import CogVideoX
from pipelines.families.first_frame import FromFirstFrame
from pipelines.families.latent_video import LatentVideo

OFS = 2.0
"""What diffusers' pipeline and the published training give as ``ofs``."""


class CogVideoXFromImage(FromFirstFrame, CogVideoX):
    """CogVideoX, image to video: 5B I2V (learned positions) and 1.5 5B I2V."""

    def _check_inputs(self) -> None:
        channels = int(self.config.get("in_channels", 16))
        if channels != 2 * self.latent_channels:
            raise PipelineError(
                f"the transformer of {self.name_or_path} takes {channels} channels; an image-to-video model of an"
                f" autoencoder with {self.latent_channels} takes {2 * self.latent_channels}."
            )

    @property
    def _learned_positions(self) -> bool:
        return bool(self.config.get("use_learned_positional_embeddings"))

    def check_size(self, height: int, width: int) -> None:
        """Raise `PipelineError` as `CogVideoX` does, and for any other size than the one with learned positions."""
        super().check_size(height, width)
        own = [side * self.vae_factor for side in self._trained_sides]
        if self._learned_positions and [height, width] != own:
            raise PipelineError(
                f"{self.name_or_path} has learned positions for frames of {own[0]} x {own[1]} alone, not {height} x"
                f" {width}."
            )

    def check_frames(self, frames: int) -> None:
        """Raise `PipelineError` as `LatentVideo` does, and for any other number than that of learned positions."""
        super().check_frames(frames)
        own = int(self.config.get("sample_frames", 49))
        if self._learned_positions and frames != own:
            raise PipelineError(f"{self.name_or_path} has learned positions for {own} frames alone, not {frames}.")

    def _encode_first(self, frames: Tensor) -> dict[str, Tensor]:
        media = frames.unsqueeze(1).to(self.encoder("vae").dtype) * 2.0 - 1.0
        mean, _ = LatentVideo._moments(self, media)  # without the frame that 1.5 has in front
        _, scale = self._latent_scaling(mean)
        return {"first_frame": mean / scale if self._vae_config.get("invert_scale_latents") else mean * scale}

    def _inputs(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        given = torch.zeros_like(x_t)
        given[:, :, :1] = self._first_frame(cond).to(x_t)
        return torch.cat([x_t, given], dim=1)

    def _beside(self, x_t: Tensor) -> dict[str, Tensor]:
        return {"ofs": x_t.new_full((1,), OFS)} if self.config.get("ofs_embed_dim") else {}
