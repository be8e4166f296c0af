"""What generators over an autoencoder's latents share: encode and decode media, encode prompts in batches.

Latent diffusion: arXiv 2112.10752. A family adds its denoiser, its text encoders and its sizes.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.components import component_config, has_component
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.generator import Generator

ENCODE_BATCH = 64
CUT_SHOWN = 40
"""Characters of a prompt that is too long, in the warning about it."""


def single(tensor: Tensor) -> Tensor:
    """Leave half precision; float64, which tests compute in, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Latent(Generator):
    """A generator over the latents of an autoencoder; `LatentImage` and `LatentVideo` add the shape of its media."""

    _showed_cut = False

    def _check_encoders(self) -> None:
        """Raise `PipelineError` if the directory lacks the autoencoder, a text encoder or a tokenizer."""
        missing = [name for name in (*self.vae_names, *self.text_names) if not has_component(self.index, name)]
        if missing:
            raise PipelineError(f"{self.name_or_path} lacks {', '.join(missing)}, which '{self.family}' models need.")

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return component_config(self.root, "vae")

    @property
    def vae_factor(self) -> int:
        """How many pixels a side one latent covers."""
        channels = self._vae_config.get("block_out_channels") or self._vae_config["encoder_block_out_channels"]
        return int(2 ** (len(channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, as the autoencoder's configuration gives them."""
        return int(self._vae_config["latent_channels"])

    @abstractmethod
    def describe_size(self) -> str:
        """Return the size of the media in words."""

    @property
    def side_multiple(self) -> int:
        """What the sides of images or frames are multiples of, in pixels."""
        return self.vae_factor

    def check_size(self, height: int, width: int) -> None:
        """Raise `PipelineError`, with the nearest size that would do, for media that the model cannot take."""
        nearest = [self._nearest_side(side) for side in (height, width)]
        if nearest != [height, width]:
            raise PipelineError(
                f"'{self.family}' takes {self.modality}s with sides that are {self._sides}, not {height} x {width};"
                f" the nearest size is {nearest[0]} x {nearest[1]}."
            )

    @property
    def _sides(self) -> str:
        return f"multiples of {self.side_multiple}"

    def _nearest_side(self, side: int) -> int:
        return max(1, round(side / self.side_multiple)) * self.side_multiple

    def encode(self, media: Float[Tensor, "batch *media"]) -> Float[Tensor, "batch channels *latent"]:
        """Return the posterior mean of media in [0, 1], scaled for the denoiser."""
        return self.encode_posterior(media)[0]

    def encode_posterior(
        self, media: Float[Tensor, "batch *media"]
    ) -> tuple[Float[Tensor, "batch channels *latent"], Float[Tensor, "batch channels *latent"]]:
        """Return mean and standard deviation of the latents' posterior, scaled; std is 0 for `AutoencoderTiny`."""
        self._check_media(media)
        mean, std = self._moments(media.to(self.device, self.encoder("vae").dtype) * 2.0 - 1.0)
        shift, scale = self._latent_scaling(mean)
        return (mean - shift) * scale, std * scale

    def decode(self, latents: Float[Tensor, "batch channels *latent"]) -> Float[Tensor, "batch *media"]:
        """Return media in [0, 1], float32 (or float64); differentiable where the clamp is not active."""
        shift, scale = self._latent_scaling(latents)
        media = self._media((latents / scale + shift).to(self.device, self.encoder("vae").dtype))
        return (single(media) / 2.0 + 0.5).clamp(0.0, 1.0)

    @abstractmethod
    def _check_media(self, media: Tensor) -> None:
        """Raise `PipelineError` for media of a shape that the model cannot take."""

    def _moments(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation that the autoencoder gives for media in [-1, 1], float32."""
        encoded = self.encoder("vae").encode(media)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        mean = encoded.latents.float()
        return mean, torch.zeros_like(mean)

    def _media(self, latents: Tensor) -> Tensor:
        """Return the media in [-1, 1] that the autoencoder makes of latents in its own scale."""
        media: Tensor = self.encoder("vae").decode(latents, return_dict=False)[0]
        return media

    def _latent_scaling(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return shift and scale of the latents; some SDXL autoencoders (Playground 2.5) give them per channel."""
        config = self._vae_config
        scale = config.get("scaling_factor") or 1.0
        if not isinstance(scale, int | float):
            raise PipelineError(
                f"{self.root / 'vae' / 'config.json'}: scaling_factor is {scale!r}; allowed: a number."
            )
        if config.get("latents_mean") and config.get("latents_std"):
            ones = (1,) * (like.ndim - 2)
            mean, std = (like.new_tensor(config[key]).reshape(1, -1, *ones) for key in ("latents_mean", "latents_std"))
            return mean, scale / std
        return float(config.get("shift_factor") or 0.0), scale

    def _encoder_dtype(self, name: str) -> torch.dtype:
        # SDXL's autoencoder overflows in fp16; its configuration says so.
        overflows = name == "vae" and self._load_dtype == torch.float16 and self._vae_config.get("force_upcast", True)
        return torch.float32 if overflows else self._load_dtype

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, each distinct one once, as diffusers' pipeline does; warns, with a count, if any are cut."""
        if isinstance(prompts, str):
            raise PipelineError("encode_prompts takes a list of prompts, got one string; write [prompt].")
        if not prompts:
            raise PipelineError("encode_prompts needs at least one prompt, got none.")
        position = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        distinct = list(position)
        with torch.no_grad():
            parts = [
                self._encode_batch(distinct[start : start + ENCODE_BATCH])
                for start in range(0, len(distinct), ENCODE_BATCH)
            ]
        encoded = Conditioning.cat(parts)
        return encoded if len(distinct) == len(prompts) else encoded[[position[prompt] for prompt in prompts]]

    @abstractmethod
    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        """Encode a few prompts, without a gradient."""

    def _tokenize(
        self,
        name: str,
        prompts: list[str],
        length: int | None = None,
        *,
        warn: bool = True,
        texts: list[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return token ids and mask, padded and cut to `length` (default: the tokenizer's); counts cut prompts.

        `texts` are the prompts in a template, whose tokens count too (default: the prompts alone).
        """
        tokenizer = self.encoder(name)
        length = length or tokenizer.model_max_length
        texts = prompts if texts is None else texts
        if warn:
            untruncated = tokenizer(texts, verbose=False)["input_ids"]
            cut = [prompt for prompt, ids in zip(prompts, untruncated, strict=True) if len(ids) > length]
            if cut:
                shown = cut[0] if len(cut[0]) <= CUT_SHOWN else f"{cut[0][:CUT_SHOWN]}..."
                example = "" if self._showed_cut else f", such as '{shown}'"
                self._showed_cut = True
                text = f"{len(cut)} of {len(prompts)} prompts exceed {length} tokens and were cut{example}"
                warnings.warn(text, stacklevel=4)
        padded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {key: padded[key].to(self.device) for key in ("input_ids", "attention_mask")}

    def _make_unconditional(self) -> Conditioning:
        return self.encode_prompts([""])
