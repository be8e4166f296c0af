"""What flow-matching image transformers share: sizes and the shift that depends on them."""

from __future__ import annotations

from abc import abstractmethod

from pipelines.families.flow_transformer import FlowTransformer
from pipelines.families.latent_image import LatentImage


class TransformerImage(FlowTransformer, LatentImage):
    """A flow-matching transformer over image latents.

    A family gives `predict`, `_encode_batch`, the class attributes, and `_default_side`.
    """

    def _choose_size(self) -> None:
        side = self.flow.image_size or self._default_side
        self.check_size(side, side)
        self._latent_side = side // self.vae_factor

    @property
    @abstractmethod
    def _default_side(self) -> int:
        """The side, in pixels, of the images that the family's own pipeline makes by default."""

    @property
    def largest_side(self) -> int | None:
        """The largest side in pixels, where the network has positions for no more tokens."""
        return None

    @property
    def _sides(self) -> str:
        return super()._sides + ("" if self.largest_side is None else f" up to {self.largest_side}")

    def _nearest_side(self, side: int) -> int:
        nearest = super()._nearest_side(side)
        return nearest if self.largest_side is None else min(nearest, self.largest_side)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image."""
        return self.latent_channels, self._latent_side, self._latent_side
