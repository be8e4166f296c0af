"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a flow transformer conditioned by two CLIPs and T5.

The text is that of diffusers' ``StableDiffusion3Pipeline``: the CLIPs' hidden states side by side, filled up with
zeros to T5's width, followed by T5's; pooled are the CLIPs' projections. Without T5 (``[null, null]`` in the index)
zeros stand in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.components import has_component
from pipelines.conditioning import Conditioning
from pipelines.families.latent import single
from pipelines.families.transformer_image import TransformerImage

T5_NAMES = ("text_encoder_3", "tokenizer_3")


class StableDiffusion3(TransformerImage):
    """Stable Diffusion 3 and 3.5, medium and large."""

    family = "sd3"
    text_names: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *T5_NAMES)
    default_text_length = 256

    def __init__(self, root: Any, index: dict[str, Any], **options: Any) -> None:
        """Load as `TransformerImage` does; T5 may be absent."""
        self.has_t5 = has_component(index, "text_encoder_3")
        if not self.has_t5:
            self.text_names = tuple(name for name in type(self).text_names if name not in T5_NAMES)
        super().__init__(root, index, **options)

    @property
    def _default_side(self) -> int:
        return int(self.config["sample_size"]) * self.vae_factor

    @property
    def largest_side(self) -> int:
        """The largest side in pixels: the network has positions for no more tokens."""
        return int(self.config["pos_embed_max_size"]) * self.side_multiple

    def predict(
        self, x_t: Float[Tensor, "batch channels height width"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the transformer once, without guidance; the output, ``noise - x0``, is float32 (or float64)."""
        dtype = self.dtype
        output = self.network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            pooled_projections=self._pooled(cond),
            return_dict=False,
        )[0]
        return single(output)

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        # CLIP cuts at 77 tokens; a prompt loses text only where T5 cuts it too.
        clips = [self._clip(suffix, prompts, warn=not self.has_t5) for suffix in ("", "_2")]
        hidden = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        if self.has_t5:
            t5 = self._t5("_3", prompts)
        else:
            t5 = hidden.new_zeros(len(prompts), self.text_length, self.config["joint_attention_dim"])
        hidden = torch.nn.functional.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        return Conditioning(torch.cat([hidden, t5.to(hidden.dtype)], dim=1), pooled)
