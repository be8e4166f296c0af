"""Every objective as a pure function on tensors: no models, no configuration, no state; imports torch alone."""

from mmalign.losses.denoising import denoising_error
from mmalign.losses.diffusion_dpo import diffusion_dpo, diffusion_dpo_logit

__all__ = ["denoising_error", "diffusion_dpo", "diffusion_dpo_logit"]
