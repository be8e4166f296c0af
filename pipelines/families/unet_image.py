"""Stable Diffusion 1.x, 2.x and XL: a UNet over autoencoder latents, conditioned by CLIP text encoders.

Latent diffusion: arXiv 2112.10752; SDXL: arXiv 2307.01952. Any diffusers directory of these pipelines works, with
epsilon, v or sample prediction, with `AutoencoderKL` or `AutoencoderTiny`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent_image import LatentImage
from pipelines.families.unet import UNet


class StableDiffusion(UNet, LatentImage):
    """Stable Diffusion 1.x and 2.x (one text encoder)."""

    family = "sd"

    def __init__(
        self, root: Path, index: dict[str, Any], *, name_or_path: str, image_size: int | None = None, **options: Any
    ) -> None:
        """Load as `UNet` does; `image_size` is the side in pixels, by default the model's own, checked at once."""
        self.root, self.index, self.name_or_path = root, index, name_or_path
        self._check_encoders()
        if image_size is not None:
            self.check_size(image_size, image_size)
        self._chosen_side = image_size
        super().__init__(root, index, name_or_path=name_or_path, **options)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image, by default at the model's own size."""
        side = self._chosen_side
        height, width = self.own_sides if side is None else (side // self.vae_factor,) * 2
        return self.bare_network.config.in_channels, height, width


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL base (two text encoders, pooled embedding, size conditioning)."""

    family = "sdxl"
    text_names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    added_conditioning = "text_time"

    @property
    def text_id(self) -> str:
        """Identifies the text encoders and the size of the images, which is part of the conditioning."""
        return f"{super().text_id}-{'x'.join(map(str, self.latent_shape[1:]))}"

    def _added(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        if cond.pooled is None or cond.time_ids is None:
            raise PipelineError(
                "SDXL needs pooled embeddings and time_ids; encode the prompts with an SDXL generator."
            )
        return {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids}

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        hidden = []
        for suffix in ("", "_2"):
            encoder = self.encoder(f"text_encoder{suffix}")
            tokens = self._tokenize(f"tokenizer{suffix}", prompts)
            output = encoder(tokens["input_ids"], output_hidden_states=True)
            # SDXL was trained on the last hidden layer but one of both encoders and the projection of the second.
            hidden.append(output.hidden_states[-2])
        height, width = (side * self.vae_factor for side in self.latent_shape[1:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
        return Conditioning(torch.cat(hidden, dim=-1), output.text_embeds, sizes.repeat(len(prompts), 1))

    def _make_unconditional(self) -> Conditioning:
        empty = self.encode_prompts([""])
        if not self.index.get("force_zeros_for_empty_prompt", True) or empty.pooled is None:
            return empty
        return Conditioning(torch.zeros_like(empty.prompt_embeds), torch.zeros_like(empty.pooled), empty.time_ids)
