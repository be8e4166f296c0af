"""LTX-Video (arXiv 2501.00103): a flow transformer over latents of 8 x 32 x 32 pixels (128 channels), with T5.

The conventions are those of diffusers' ``LTXPipeline``: one token a latent, the frame rate in the positions, T5 with a
mask over padding, levels shifted by the number of tokens and stretched to the scheduler's last. Statistics of the
latents are buffers of the autoencoder. Its decoder may take a noise level of its own (0.9.1 and newer), which changes
the pictures: it is that of the model's card, and its noise the same for every video.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines import adapters
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.flow_transformer import FlowTransformer
from pipelines.families.latent import single
from pipelines.families.latent_video import LatentVideo
from pipelines.video import VideoOptions

DECODE_SEED = 0
"""Of the noise that a decoder with a noise level of its own adds to latents."""


class LTX(FlowTransformer, LatentVideo):
    """LTX-Video, text to video."""

    family = "ltx"
    text_names = ("text_encoder", "tokenizer")
    lora_targets = adapters.DEFAULT_TARGETS
    default_text_length = 128
    default_video = VideoOptions(512, 704, 161, 25)
    even_sigmas = True
    decode_timestep: float = 0.05
    """The decoder's noise level, where it takes one; 0..1."""
    decode_noise_scale: float = 0.025
    """The share of noise that such a decoder's latents are given; 0..1."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's large weights."""
        found: torch.dtype = self.bare_network.proj_in.weight.dtype
        return found

    @property
    def vae_factor(self) -> int:
        """How many pixels a side one latent covers."""
        return self._compression("spatial_compression_ratio", "patch_size")

    @property
    def frame_step(self) -> int:
        """How many frames each latent frame but the first stands for."""
        return self._compression("temporal_compression_ratio", "patch_size_t")

    def _compression(self, key: str, patch: str) -> int:
        config = self._vae_config
        return int(config.get(key) or config[patch] * 2 ** sum(config["spatio_temporal_scaling"]))

    def _check_channels(self) -> None:
        super()._check_channels()
        if (patches := (self.config.get("patch_size", 1), self.config.get("patch_size_t", 1))) != (1, 1):
            raise PipelineError(
                f"the transformer of {self.name_or_path} has patches of {patches} latents; supported are single ones."
            )

    def predict(
        self, x_t: Float[Tensor, "batch channels frames h w"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels frames h w"]:
        """Run the transformer once on a token a latent; the output, ``noise - x0``, is float32 (or float64)."""
        if cond.mask is None:
            raise PipelineError("'ltx' needs the mask of each prompt; encode the prompts with this generator.")
        dtype, (frames, height, width) = self.dtype, x_t.shape[2:]
        output = self.network(
            hidden_states=x_t.to(dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            timestep=t,
            encoder_attention_mask=cond.mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.frame_step / self.fps, self.vae_factor, self.vae_factor),
            return_dict=False,
        )[0]
        return single(output).transpose(1, 2).unflatten(2, (frames, height, width))

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        tokens = self._tokenize("tokenizer", prompts, self.text_length)
        hidden, mask = self.encoder("text_encoder")(tokens["input_ids"])[0], tokens["attention_mask"].bool()
        return Conditioning(torch.where(mask.unsqueeze(-1), hidden, torch.zeros_like(hidden)), mask=mask)

    def _latent_scaling(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.encoder("vae")
        mean, std = (one.to(like).reshape(1, -1, 1, 1, 1) for one in (vae.latents_mean, vae.latents_std))
        return mean, float(self._vae_config.get("scaling_factor") or 1.0) / std

    def _decode_one(self, latents: Tensor) -> Tensor:
        vae, time = self.encoder("vae"), None
        if self._vae_config.get("timestep_conditioning"):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(DECODE_SEED)).to(latents)
            latents = (1 - self.decode_noise_scale) * latents + self.decode_noise_scale * noise
            time = torch.tensor([self.decode_timestep]).to(latents)
        video: Tensor = vae.decode(latents, time, return_dict=False)[0]
        return video
