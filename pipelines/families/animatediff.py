"""AnimateDiff: Stable Diffusion 1.x with motion modules, which attend over the frames of a video at each place.

AnimateDiff: arXiv 2307.04725. The conventions are those of diffusers' ``AnimateDiffPipeline``: each frame has latents
of its own from the autoencoder of images, and the same text. The U-Net may have any noise process that those of images
may have: AnimateDiff's own is epsilon prediction on linear betas.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.adapters import DEFAULT_TARGETS
from pipelines.components import component_config, has_component, load_component
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent import Latent
from pipelines.families.latent_video import LatentVideo
from pipelines.families.unet import UNet
from pipelines.noise import FlowProcess
from pipelines.video import VideoOptions

FRAMES, FPS = 16, 8.0
"""Frames that diffusers' pipeline makes by default, if the motion modules have positions for them, and their rate."""
CHUNK = 16
"""Frames that the autoencoder takes at once, as in diffusers' pipeline."""
MOTION = ".motion_modules."


class AnimateDiff(UNet, LatentVideo):
    """A U-Net of images with motion modules; a directory may hold both in one, or apart as U-Net and adapter.

    The groups of a LoRA's targets are "motion", the attention over frames, and "image", that within frames; by default
    both.
    """

    family = "animatediff"
    decode_context = 0

    @cached_property
    def _motion_config(self) -> dict[str, Any]:
        """The configuration that says how many frames the motion modules have positions for."""
        return component_config(self.root, "motion_adapter") if self._is_apart else self._unet_config

    @property
    def _is_apart(self) -> bool:
        return bool(self.index["unet"][1] == "UNet2DConditionModel")

    @property
    def most_frames(self) -> int:
        """The longest video that the motion modules have positions for."""
        return int(self._motion_config.get("motion_max_seq_length") or 32)

    @property
    def default_video(self) -> VideoOptions:
        """The geometry that diffusers' pipeline has by default."""
        height, width = (side * self.vae_factor for side in self.own_sides)
        return VideoOptions(height, width, min(FRAMES, self.most_frames), FPS)

    def _load_network(self, dtype: torch.dtype) -> Any:
        """Load the U-Net, and put the motion modules into it where they lie apart."""
        network = load_component(self.root, self.index, "unet", dtype)
        if not self._is_apart:
            return network
        from diffusers import UNetMotionModel

        if not has_component(self.index, "motion_adapter"):
            raise PipelineError(f"{self.name_or_path} lacks motion_adapter, which '{self.family}' models need.")
        adapter = load_component(self.root, self.index, "motion_adapter", dtype)
        try:
            return UNetMotionModel.from_unet2d(network, adapter).eval()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PipelineError(
                f"the motion adapter of {self.name_or_path} does not fit its U-Net: {reason}"
            ) from error

    @property
    def saved_index(self) -> dict[str, Any]:
        """The index of what `save` writes: one U-Net, which holds the motion modules as they are now."""
        return {**self.index, "unet": ["diffusers", "UNetMotionModel"], "motion_adapter": [None, None]}

    @property
    def target_groups(self) -> dict[str, list[str]]:
        """The layers that each name for a group of a LoRA's targets stands for."""
        names = [name for name, _ in self.bare_network.named_modules() if name.endswith(DEFAULT_TARGETS)]
        return {
            "motion": [name for name in names if MOTION in name],
            "image": [name for name in names if MOTION not in name],
        }

    def describe(self) -> str:
        """Return the geometry and, for a U-Net of rectified flow, how levels are placed and drawn."""
        levels = f"; {self.process.describe()}" if isinstance(self.process, FlowProcess) else ""
        return f"{self.family}: {self.describe_size()}{levels}"

    def predict(
        self, x_t: Float[Tensor, "batch channels frames h w"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels frames h w"]:
        """Run the U-Net once, without guidance; each frame has the text of its video."""
        return super().predict(x_t, t, cond.repeat_interleave(x_t.shape[2]))

    def _moments(self, media: Tensor) -> tuple[Tensor, Tensor]:
        found = [Latent._moments(self, chunk) for chunk in media.flatten(0, 1).split(CHUNK)]
        moments = (torch.cat(parts).unflatten(0, media.shape[:2]) for parts in zip(*found, strict=True))
        mean, std = (one.transpose(1, 2) for one in moments)
        return mean, std

    def _media(self, latents: Tensor) -> Tensor:
        frames = latents.transpose(1, 2)
        decoded = [Latent._media(self, chunk) for chunk in frames.flatten(0, 1).split(CHUNK)]
        return torch.cat(decoded).unflatten(0, frames.shape[:2])

    def decode_checkpointed(
        self, latents: Float[Tensor, "batch channels frames h w"], batch_size: int | None = 1
    ) -> Float[Tensor, "batch frames 3 height width"]:
        """Decode as `Generator.decode_checkpointed` does; `batch_size` counts frames, by default one at a time."""
        frames = latents.transpose(1, 2)
        singles = super().decode_checkpointed(frames.flatten(0, 1).unsqueeze(2), batch_size)
        return singles.squeeze(1).unflatten(0, frames.shape[:2])
