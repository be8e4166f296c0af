"""FLUX.1 dev and schnell: a flow transformer on 2 x 2 packed latents, conditioned by T5 and CLIP's pooled embedding.

No paper; the conventions are those of diffusers' ``FluxPipeline``. The dev model is distilled from guidance: its scale
is an input of the network, here `embedded_guidance`, the same in sampling and in training. Neither model is sampled
with classifier-free guidance, unless a negative conditioning is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.flow_transformer import JOINT_ATTENTION
from pipelines.families.latent import single
from pipelines.families.transformer_image import TransformerImage

DEFAULT_SIDE = 128
"""Latents a side of the images that diffusers' pipeline makes by default; the network has no size of its own."""
DEFAULT_GUIDANCE = 3.5


def pack(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens packed"]:
    """Return 2 x 2 patches as tokens, row by row, each of ``4 * channels``: channel, then row, then column.

    >>> pack(torch.arange(8.0).reshape(1, 1, 2, 4)).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(
    tokens: Float[Tensor, "batch tokens packed"], height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """Return the latents, of `height` and `width`, that `pack` made tokens of."""
    patches = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, height, width)


def positions(height: int, width: int) -> Float[Tensor, "tokens 3"]:
    """Return ``(0, row, column)`` of each token of latents of `height` and `width`."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


class Flux(TransformerImage):
    """FLUX.1 dev and schnell."""

    family = "flux"
    text_names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    default_text_length = 512
    even_sigmas = True
    guidance_inside = True
    patch_size = 2
    lora_targets = (
        *JOINT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @property
    def network_channels(self) -> int:
        """Channels of the latents, four of which make a packed one."""
        return int(self.config["in_channels"]) // 4

    @property
    def _default_side(self) -> int:
        return DEFAULT_SIDE * self.vae_factor

    def _choose_guidance(self, given: float | None) -> float | None:
        if not self.config.get("guidance_embeds"):
            return super()._choose_guidance(given)
        scale = DEFAULT_GUIDANCE if given is None else given
        if not 0.0 <= scale < math.inf:
            raise PipelineError(f"embedded_guidance must be a number of at least 0, got {scale}.")
        return scale

    def predict(
        self, x_t: Float[Tensor, "batch channels height width"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the transformer once on packed latents; the output, ``noise - x0``, is float32 (or float64)."""
        dtype, (height, width) = self.dtype, x_t.shape[-2:]
        if height % 2 or width % 2:
            self.check_size(height * self.vae_factor, width * self.vae_factor)
        text = cond.prompt_embeds.to(dtype)
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((len(x_t),), self.embedded_guidance, dtype=torch.float32, device=x_t.device)
        output = self.network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.to(dtype) / self.process.num_train_timesteps,
            guidance=guidance,
            pooled_projections=self._pooled(cond),
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=positions(height, width).to(text),
            return_dict=False,
        )[0]
        return unpack(single(output), height, width)

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        # CLIP gives the pooled embedding alone, so that a prompt loses text only where T5 cuts it.
        pooled: Any = self._clip("", prompts).pooler_output
        return Conditioning(self._t5("_2", prompts), pooled)
