"""The network of the latent reward model: half a diffusion UNet and its text encoders, read as a noise-aware CLIP.

Source: Zhang et al. 2025, "Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference
Optimization" (arXiv:2502.01051; code Kwai-Kolors/LPO). For noisy latents x_t of a prompt c

    score(x_t, t, c) = exp(tau) cos( W_v V, W_t E ),     tau = log(1 / 0.07) = 2.6592 before training

E is the pooled text; V joins the spatial means of what each down block ends in, before it shrinks the latents, and of
the middle block, whose part is enhanced as by classifier-free guidance: V_mid = V_empty + g (V_prompt - V_empty).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

INITIAL_LOGIT_SCALE = 2.6592
MAX_LOGIT_SCALE = 4.6052
"""Scores stay within +-100, as CLIP's do."""


class Texts(NamedTuple):
    """Encoded prompts: hidden states for the UNet's attention, and the pooled text that media are compared with."""

    hidden: Float[Tensor, "batch length width"]
    pooled: Float[Tensor, "batch features"]

    def rows(self, index: Int[Tensor, " rows"]) -> Texts:
        """Return some of them, in this order."""
        return Texts(self.hidden[index], self.pooled[index])


class LatentNetwork(nn.Module):
    """Score noisy latents against prompts; everything in it is trained together.

    `unet` is a `UNet2DConditionModel`, whose second half is cut off in place; `text_encoders` the one of SD1.x and 2.x
    or the two of SDXL, in the order of their pipeline. `image_size`, in pixels, is SDXL's size conditioning.
    """

    def __init__(
        self,
        unet: Any,
        text_encoders: Sequence[Any],
        *,
        image_size: int,
        guidance: float = 7.5,
        features: int | None = None,
    ) -> None:
        """Join the parts; the text projection starts as the identity (or random, for another number of features)."""
        super().__init__()
        self.unet = cut_in_half(unet)
        self.text_encoders = nn.ModuleList(text_encoders)
        self.image_size, self.guidance = image_size, guidance
        config = text_encoders[-1].config
        width = config.projection_dim if _has_projection(text_encoders[-1]) else config.hidden_size
        self.text_projection = nn.Linear(width, features or width, bias=False)
        if features in (None, width):
            # A rotation of the space that both projections end in changes nothing, so the text's may start anywhere.
            nn.init.eye_(self.text_projection.weight)
        channels = self.unet.config.block_out_channels
        self.visual_projection = nn.Linear(sum(channels) + channels[-1], features or width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def encode(self, tokens: Sequence[Int[Tensor, "batch length"]]) -> Texts:
        """Encode prompts as the model's own pipeline does, given their token ids for each text encoder."""
        several = len(self.text_encoders) > 1
        hidden = []
        for encoder, ids in zip(self.text_encoders, tokens, strict=True):
            output = encoder(ids, output_hidden_states=several)
            hidden.append(output.hidden_states[-2] if several else output.last_hidden_state)
        pooled = output.text_embeds if _has_projection(self.text_encoders[-1]) else output.pooler_output
        return Texts(torch.cat(hidden, dim=-1), pooled)

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        t: Shaped[Tensor, " batch"],
        texts: Texts,
        empty: Texts,
    ) -> Float[Tensor, " batch"]:
        """Score each noisy latent at its noise level against its text; `empty` is the empty prompt, a batch of one."""
        visual = self.visual_projection(self.features(latents, t, texts, empty))
        text = self.text_projection(texts.pooled)
        # In half precision different cosines could become equal.
        exact = torch.promote_types(text.dtype, torch.float32)
        cosine = (F.normalize(visual.to(exact), dim=-1) * F.normalize(text.to(exact), dim=-1)).sum(-1)
        return self.logit_scale.to(exact).exp() * cosine

    def features(
        self,
        latents: Float[Tensor, "batch channels height width"],
        t: Shaped[Tensor, " batch"],
        texts: Texts,
        empty: Texts,
    ) -> Float[Tensor, "batch features"]:
        """Return V: means of every level of the UNet's first half, the last enhanced by the empty prompt's."""
        count = len(latents)
        if self.guidance == 1.0:
            return torch.cat(self._levels(latents, t, texts), dim=-1)
        both = Texts(*(torch.cat([own, none.expand_as(own)]) for own, none in zip(texts, empty, strict=True)))
        *down, middle = self._levels(torch.cat([latents, latents]), torch.cat([t, t]), both)
        prompted, unprompted = middle[:count], middle[count:]
        enhanced = unprompted + self.guidance * (prompted - unprompted)
        return torch.cat([*(level[:count] for level in down), enhanced], dim=-1)

    def _levels(self, x: Tensor, t: Tensor, texts: Texts) -> list[Tensor]:
        """Return the spatial mean of each down block's last state before it shrinks, and of the middle block."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
        added = unet.get_aug_embed(emb=emb, encoder_hidden_states=texts.hidden, added_cond_kwargs=self._added(texts))
        emb = emb if added is None else emb + added
        x = unet.conv_in(x)
        means = []
        for block in unet.down_blocks:
            attends = {"encoder_hidden_states": texts.hidden} if getattr(block, "has_cross_attention", False) else {}
            x, states = block(hidden_states=x, temb=emb, **attends)
            means.append(states[-1 if block.downsamplers is None else -2].mean((2, 3)))
        return [*means, unet.mid_block(x, emb, encoder_hidden_states=texts.hidden).mean((2, 3))]

    def _added(self, texts: Texts) -> dict[str, Tensor]:
        if self.unet.config.addition_embed_type is None:
            return {}
        size = float(self.image_size)
        sizes = torch.tensor([size, size, 0.0, 0.0, size, size], device=texts.pooled.device)
        return {"text_embeds": texts.pooled, "time_ids": sizes.expand(len(texts.pooled), 6)}


def cut_in_half(unet: Any) -> Any:
    """Remove all parts after the middle block of a `UNet2DConditionModel`, in place."""
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = unet.conv_out = None
    return unet


def _has_projection(encoder: Any) -> bool:
    return hasattr(encoder, "text_projection")
