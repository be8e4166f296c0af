"""Stable Diffusion 1.x, 2.x and XL: a UNet over autoencoder latents, conditioned by CLIP text encoders.

Latent diffusion: arXiv 2112.10752; SDXL: arXiv 2307.01952. Any diffusers directory of these pipelines works, with
epsilon, v or sample prediction, with `AutoencoderKL` or `AutoencoderTiny`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.components import component_config, has_component
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.generator import Generator

ENCODE_BATCH = 64
CUT_SHOWN = 40
"""Characters of a prompt that is too long, in the warning about it."""
UNET_STRUCTURE = frozenset(
    """sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types
    mid_block_type up_block_types only_cross_attention block_out_channels layers_per_block downsample_padding
    mid_block_scale_factor dropout act_fn norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block
    reverse_transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection upcast_attention
    resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_type time_embedding_dim
    time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel mid_block_only_cross_attention
    cross_attention_norm addition_embed_type addition_embed_type_num_heads addition_time_embed_dim
    projection_class_embeddings_input_dim torch_dtype dtype""".split()
)
"""Keys of a UNet's config that diffusers' UNet acts on by itself, or that are checked below."""
UNET_INPUTS = {
    "class_embed_type": "a class label",
    "num_class_embeds": "a class label",
    "class_embeddings_concat": "a class label",
    "time_cond_proj_dim": "a guidance embedding (a distilled model, such as LCM)",
    "encoder_hid_dim": "other embeddings than those of its text encoders",
    "encoder_hid_dim_type": "other embeddings than those of its text encoders",
    "dual_cross_attention": "two prompts",
}
"""Keys that give the UNet an input beside image, timestep and text -> that input; null or false: none."""


def _single(tensor: Tensor) -> Tensor:
    """Leave half precision; float64, which tests compute in, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class StableDiffusion(Generator):
    """Stable Diffusion 1.x and 2.x (one text encoder)."""

    family = "sd"
    network_name = "unet"
    text_names: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    added_conditioning: str | None = None
    _showed_cut = False

    def __init__(self, *args: Any, **options: Any) -> None:
        """Load as `Generator` does, and refuse UNets with inputs other than text (inpainting, refiner, editing)."""
        super().__init__(*args, **options)
        config = self.network.config
        missing = [name for name in (*self.vae_names, *self.text_names) if not has_component(self.index, name)]
        if missing:
            raise PipelineError(f"{self.name_or_path} lacks {', '.join(missing)}, which '{self.family}' models need.")
        self._check_unet(component_config(self.root, self.network_name))
        if config.addition_embed_type != self.added_conditioning:
            raise PipelineError(
                f"the UNet of {self.name_or_path} takes extra conditioning '{config.addition_embed_type}', not"
                f" '{self.added_conditioning}' as '{self.family}' models do; use a base text-to-image model."
            )
        channels = self._vae_config["latent_channels"]
        if config.in_channels != channels:
            raise PipelineError(
                f"the UNet of {self.name_or_path} takes {config.in_channels} channels, its autoencoder"
                f" gives {channels}; inpainting, editing and depth models are not supported, use the base model."
            )

    def _check_unet(self, config: dict[str, Any]) -> None:
        """Refuse a UNet whose config has unknown keys in use, or keys that ask for inputs that it is not given."""
        name = f"the UNet of {self.name_or_path}"
        for key, value in config.items():
            if key.startswith("_") or key in UNET_STRUCTURE or value in (None, False):
                continue
            if key in UNET_INPUTS:
                raise PipelineError(
                    f"{name} takes extra conditioning, {UNET_INPUTS[key]} ({key}: {value}); use a base text-to-image"
                    " model."
                )
            if (key, value) != ("attention_type", "default"):
                raise PipelineError(f"{name} has {key}: {value}, which is not supported; use a base model.")
        channels = config.get("in_channels", 4), config.get("out_channels", 4)
        if channels[1] not in (channels[0], self._vae_config["latent_channels"]):
            raise PipelineError(
                f"{name} gives {channels[1]} channels for {channels[0]}: it predicts a variance too, which is not"
                " supported; use a base model."
            )

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return component_config(self.root, "vae")

    @property
    def vae_factor(self) -> int:
        """How many pixels a side one latent covers."""
        channels = self._vae_config.get("block_out_channels") or self._vae_config["encoder_block_out_channels"]
        return int(2 ** (len(channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image at the model's own size."""
        config = self.bare_network.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else (size or (0, 0))
        if not 0 < min(height, width):
            raise PipelineError(
                f"{self.root / self.network_name / 'config.json'}: sample_size is {size}; give the side of the latents"
            )
        return config.in_channels, height, width

    @property
    def image_size(self) -> int:
        """The model's own image side in pixels."""
        return self.latent_shape[1] * self.vae_factor

    def predict(
        self, x_t: Float[Tensor, "batch channels height width"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the UNet once, without guidance; inputs are cast to its dtype, the output is float32 (or float64)."""
        dtype = self.dtype
        output = self.network(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            added_cond_kwargs=self._added(cond, dtype),
            return_dict=False,
        )[0]
        return _single(output)

    def _added(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        return None

    def encode(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return the posterior mean of media in [0, 1], scaled for the UNet."""
        return self.encode_posterior(media)[0]

    def encode_posterior(
        self, media: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Return mean and standard deviation of the latents' posterior, scaled; std is 0 for `AutoencoderTiny`."""
        factor = self.vae_factor
        if media.ndim != 4 or media.shape[1] != 3 or media.shape[2] % factor or media.shape[3] % factor:
            raise PipelineError(
                f"media must be [batch, 3, height, width] with sides that are multiples of {factor},"
                f" got {list(media.shape)}."
            )
        vae = self.encoder("vae")
        encoded = vae.encode(media.to(self.device, vae.dtype) * 2.0 - 1.0)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        else:
            mean = encoded.latents.float()
            std = torch.zeros_like(mean)
        shift, scale = self._latent_scaling(mean)
        return (mean - shift) * scale, std * scale

    def decode(self, latents: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Return images in [0, 1], float32 (or float64); differentiable where the clamp is not active."""
        vae = self.encoder("vae")
        shift, scale = self._latent_scaling(latents)
        images = vae.decode((latents / scale + shift).to(self.device, vae.dtype), return_dict=False)[0]
        return (_single(images) / 2.0 + 0.5).clamp(0.0, 1.0)

    def _latent_scaling(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return shift and scale of the latents; some SDXL autoencoders (Playground 2.5) give them per channel."""
        config = self._vae_config
        scale = config.get("scaling_factor") or 1.0
        if not isinstance(scale, int | float):
            raise PipelineError(
                f"{self.root / 'vae' / 'config.json'}: scaling_factor is {scale!r}; allowed: a number."
            )
        if config.get("latents_mean") and config.get("latents_std"):
            mean, std = (like.new_tensor(config[key]).reshape(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
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

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        encoder = self.encoder("text_encoder")
        tokens = self._tokenize("tokenizer", prompts)
        mask = tokens["attention_mask"] if getattr(encoder.config, "use_attention_mask", False) else None
        return Conditioning(encoder(tokens["input_ids"], attention_mask=mask)[0])

    def _tokenize(self, name: str, prompts: list[str]) -> dict[str, Tensor]:
        """Return token ids and mask, padded and cut to the tokenizer's length; warns with a count of cut prompts."""
        tokenizer = self.encoder(name)
        length = tokenizer.model_max_length
        untruncated = tokenizer(prompts, verbose=False)["input_ids"]
        cut = [prompt for prompt, ids in zip(prompts, untruncated, strict=True) if len(ids) > length]
        if cut:
            shown = cut[0] if len(cut[0]) <= CUT_SHOWN else f"{cut[0][:CUT_SHOWN]}..."
            example = "" if self._showed_cut else f", such as '{shown}'"
            self._showed_cut = True
            text = f"{len(cut)} of {len(prompts)} prompts exceed {length} tokens and were cut{example}"
            warnings.warn(text, stacklevel=4)
        padded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {key: padded[key].to(self.device) for key in ("input_ids", "attention_mask")}

    def _make_unconditional(self) -> Conditioning:
        return self.encode_prompts([""])


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL base (two text encoders, pooled embedding, size conditioning)."""

    family = "sdxl"
    text_names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    added_conditioning = "text_time"

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
