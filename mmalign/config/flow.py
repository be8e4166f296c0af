"""The section of a run's configuration for flow models (SD3, FLUX, Z-Image, Qwen-Image); others refuse it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mmalign.config.sections import Count, Guidance, Positive, StrictModel

if TYPE_CHECKING:
    from pipelines.flow import FlowOptions


class FlowConfig(StrictModel):
    """What can be chosen for a flow model besides the size of its images, which is `data.resolution`."""

    density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """how training levels are drawn from the scheduler's training grid: all alike, by the sigmoid of a normal number,
    or by SD3's density with a mode"""
    density_mean: float = 0.0
    """mean of logit_normal's normal number; below 0 prefers noisy levels"""
    density_std: Positive = 1.0
    """standard deviation of logit_normal's normal number"""
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    """scale of mode; above 0 prefers the middle levels, below 0 the ends"""
    text_length: Count | None = None
    """tokens that prompts are padded and cut to for the longest encoder, at most 512 (Qwen-Image: 1024); null: 256 for
    SD3, else 512"""
    embedded_guidance: Guidance | None = None
    """guidance scale that FLUX.1-dev takes as an input, the same in sampling and training; null: 3.5"""

    low_noise_guidance: Guidance | None = None
    """for a model of two experts (Wan 2.2 A14B): classifier-free guidance scale of the one for low noise levels
    (diffusers' guidance_scale_2); null: that of the other"""

    def options(self, image_size: int | None) -> FlowOptions:
        """Return the choices as the generator takes them."""
        from pipelines.flow import Density, FlowOptions

        density = Density(self.density, self.density_mean, self.density_std, self.mode_scale)
        return FlowOptions(image_size, self.text_length, self.embedded_guidance, density, self.low_noise_guidance)
