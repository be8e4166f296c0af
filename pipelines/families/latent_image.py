"""What image generators over an autoencoder's latents share: sides, and images to latents and back."""

from __future__ import annotations

from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.families.latent import Latent


class LatentImage(Latent):
    """An image generator over the latents of `AutoencoderKL` or `AutoencoderTiny`."""

    @property
    def image_size(self) -> int:
        """The image side in pixels, by default the model's own."""
        return int(self.latent_shape[1]) * self.vae_factor

    def describe_size(self) -> str:
        """Return the size of the images in words."""
        return f"{self.image_size} x {self.image_size} pixels"

    def _check_media(self, media: Tensor) -> None:
        if media.ndim != 4 or media.shape[1] != 3:
            raise PipelineError(f"media must be [batch, 3, height, width], got {list(media.shape)}.")
        self.check_size(media.shape[2], media.shape[3])
