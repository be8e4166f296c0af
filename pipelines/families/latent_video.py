"""What video generators over an autoencoder's latents share: geometry, and videos to latents and back.

Media are ``[batch, frames, 3, height, width]`` in [0, 1], latents ``[batch, channels, frames, height, width]`` in each
family. A causal video autoencoder makes one latent frame of the first frame and one of each `frame_step` that follow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.families.latent import Latent
from pipelines.video import VideoOptions


class LatentVideo(Latent):
    """A video generator over latents.

    A family gives `predict`, `_encode_batch`, `vae_factor`, `frame_step` and `default_video`.

    Attributes: `video`, the geometry chosen, with nothing left open.
    """

    modality = "video"
    decode_context: ClassVar[int] = 1
    """How many latent frames before a chosen one `decode_frames` gives to the autoencoder."""

    def __init__(
        self,
        root: Path,
        index: dict[str, Any],
        *,
        name_or_path: str,
        video: VideoOptions | None = None,
        **options: Any,
    ) -> None:
        """Check the geometry, then load as `Generator` does; raises `PipelineError` before any weight."""
        self.root, self.index, self.name_or_path = root, index, name_or_path
        self._check_encoders()
        self.video = (video or VideoOptions()).filled(self.default_video)
        frames, _, height, width = self.media_shape
        self.check_size(height, width)
        self.check_frames(frames)
        super().__init__(root, index, name_or_path=name_or_path, **options)

    @property
    @abstractmethod
    def default_video(self) -> VideoOptions:
        """The geometry that the family's own pipeline has by default."""

    @property
    def most_frames(self) -> int | None:
        """The longest video that the network has positions for; None: no limit."""
        return None

    @property
    def frame_step(self) -> int:
        """How many frames each latent frame but the first stands for."""
        return 1

    @property
    def frame_multiple(self) -> int:
        """What the numbers of frames after the first are multiples of."""
        return self.frame_step

    @property
    def fps(self) -> int | float:
        """Frames a second."""
        assert self.video.fps is not None
        return self.video.fps

    @property
    def media_shape(self) -> tuple[int, int, int, int]:
        """Frames, 3, height and width of one video."""
        frames, height, width = self.video.frames, self.video.height, self.video.width
        assert frames is not None and height is not None and width is not None
        return frames, 3, height, width

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of one video."""
        frames, _, height, width = self.media_shape
        return self.latent_channels, self.latent_frames(frames), height // self.vae_factor, width // self.vae_factor

    def latent_frames(self, frames: int) -> int:
        """Return how many latent frames the autoencoder makes of so many frames."""
        return (frames - 1) // self.frame_step + 1

    @property
    def image_size(self) -> int:
        """The shorter side of a frame in pixels."""
        return min(self.media_shape[2:])

    def describe_size(self) -> str:
        """Return the geometry in words."""
        frames, _, height, width = self.media_shape
        return f"{frames} frames of {height} x {width} pixels at {self.fps:g} a second"

    def check_frames(self, frames: int) -> None:
        """Raise `PipelineError`, with the nearest number that would do, for a video the model cannot take."""
        step, limit = self.frame_multiple, self.most_frames
        nearest = max(0, round((frames - 1) / step)) * step + 1
        if limit is not None:
            nearest = min(nearest, (limit - 1) // step * step + 1)
        if nearest != frames:
            rule = [*([] if step == 1 else [f"{step}k + 1"]), *([] if limit is None else [f"at most {limit}"])]
            raise PipelineError(
                f"'{self.family}' takes videos of {', '.join(rule)} frames, not {frames}; nearest: {nearest}."
            )

    def _check_media(self, media: Tensor) -> None:
        if media.ndim != 5 or media.shape[2] != 3:
            raise PipelineError(f"videos must be [batch, frames, 3, height, width], got {list(media.shape)}.")
        self.check_size(media.shape[3], media.shape[4])
        self.check_frames(media.shape[1])

    def _moments(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, a video at a time."""
        found = [super(LatentVideo, self)._moments(video) for video in media.transpose(1, 2).split(1)]
        means, stds = zip(*found, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _media(self, latents: Tensor) -> Tensor:
        """Return the videos of latents in the autoencoder's own scale, a video at a time."""
        return torch.cat([self._decode_one(one) for one in latents.split(1)]).transpose(1, 2)

    def _decode_one(self, latents: Tensor) -> Tensor:
        """Return the video ``[1, 3, frames, height, width]`` in [-1, 1] of the latents of one."""
        return super()._media(latents)

    def decode_checkpointed(
        self, latents: Float[Tensor, "batch channels frames h w"], batch_size: int | None = 1
    ) -> Float[Tensor, "batch times 3 height width"]:
        """Decode as `Generator.decode_checkpointed` does, by default a video at a time."""
        return super().decode_checkpointed(latents, batch_size)

    def decode_frames(
        self, latents: Float[Tensor, "batch channels frames h w"], frames: Sequence[int]
    ) -> Float[Tensor, "batch chosen 3 height width"]:
        """Return one picture a chosen latent frame, the last that it stands for, without decoding the whole video.

        For the gradient of a reward on a few frames (VADER, arXiv 2407.08737). Each costs `decode_context` + 1 latent
        frames; activations are computed again in the backward pass. With a causal decoder (Wan's) latent frames up to
        `decode_context` are exact; for the others the decoder does not see the rest of the video.
        """
        self._check_chosen(latents, frames)
        windows = [latents[:, :, max(0, frame - self.decode_context) : frame + 1] for frame in frames]
        return torch.stack([self.decode_checkpointed(window)[:, -1] for window in windows], dim=1)

    def _check_chosen(self, latents: Tensor, frames: Sequence[int]) -> None:
        if not frames or not all(0 <= frame < latents.shape[2] for frame in frames):
            raise PipelineError(f"latent frames must lie in 0..{latents.shape[2] - 1}, got {list(frames)}.")
