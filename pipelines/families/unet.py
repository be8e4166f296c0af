"""What U-Nets over an autoencoder's latents share, conditioned by CLIP: which are taken, one prediction, one text.

Latent diffusion: arXiv 2112.10752. A family adds the shape of its media and what else its network is told.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.components import component_config
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent import Latent, single
from pipelines.noise import FlowProcess

UNET_STRUCTURE = frozenset(
    """sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types
    mid_block_type up_block_types only_cross_attention block_out_channels layers_per_block downsample_padding
    mid_block_scale_factor dropout act_fn norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block
    reverse_transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection upcast_attention
    resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_type time_embedding_dim
    time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel mid_block_only_cross_attention
    cross_attention_norm addition_embed_type addition_embed_type_num_heads addition_time_embed_dim
    projection_class_embeddings_input_dim torch_dtype dtype transformer_layers_per_mid_block mid_block_layers
    temporal_transformer_layers_per_block reverse_temporal_transformer_layers_per_block
    temporal_transformer_layers_per_mid_block motion_max_seq_length motion_num_attention_heads
    reverse_motion_num_attention_heads use_motion_mid_block""".split()
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


class UNet(Latent):
    """A U-Net that takes latents, timestep and text, with any prediction and noise process of `NoiseProcess`."""

    network_name = "unet"
    text_names: tuple[str, ...] = ("text_encoder", "tokenizer")
    added_conditioning: str | None = None

    def __init__(self, root: Path, index: dict[str, Any], *, name_or_path: str, **options: Any) -> None:
        """Load as `Generator` does, and refuse UNets with inputs other than text (inpainting, refiner, editing)."""
        super().__init__(root, index, name_or_path=name_or_path, **options)
        config = self.network.config
        self._check_unet(self._unet_config)
        if config.addition_embed_type != self.added_conditioning:
            raise PipelineError(
                f"the UNet of {self.name_or_path} takes extra conditioning '{config.addition_embed_type}', not"
                f" '{self.added_conditioning}' as '{self.family}' models do; use a base text-to-image model."
            )
        if config.in_channels != self.latent_channels:
            raise PipelineError(
                f"the UNet of {self.name_or_path} takes {config.in_channels} channels, its autoencoder"
                f" gives {self.latent_channels}; inpainting, editing and depth models are not supported, use the base"
                " model."
            )

    @cached_property
    def _unet_config(self) -> dict[str, Any]:
        return component_config(self.root, self.network_name)

    @property
    def own_sides(self) -> tuple[int, int]:
        """Height and width of the latents at the model's own size."""
        size = self._unet_config.get("sample_size")
        height, width = (size, size) if isinstance(size, int) else (size or (0, 0))
        if not 0 < min(height, width):
            raise PipelineError(
                f"{self.root / self.network_name / 'config.json'}: sample_size is {size}; give the side of the latents"
            )
        return height, width

    def describe(self) -> str:
        """Return for a U-Net of rectified flow how levels are placed and drawn; nothing for others."""
        return f"{self.family}: {self.process.describe()}" if isinstance(self.process, FlowProcess) else ""

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
        if channels[1] not in (channels[0], self.latent_channels):
            raise PipelineError(
                f"{name} gives {channels[1]} channels for {channels[0]}: it predicts a variance too, which is not"
                " supported; use a base model."
            )

    def predict(
        self, x_t: Float[Tensor, "batch *latent"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch *latent"]:
        """Run the UNet once, without guidance; inputs are cast to its dtype, the output is float32 (or float64)."""
        dtype = self.dtype
        output = self.network(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            added_cond_kwargs=self._added(cond, dtype),
            return_dict=False,
        )[0]
        return single(output)

    def _added(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        return None

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        encoder = self.encoder("text_encoder")
        tokens = self._tokenize("tokenizer", prompts)
        mask = tokens["attention_mask"] if getattr(encoder.config, "use_attention_mask", False) else None
        return Conditioning(encoder(tokens["input_ids"], attention_mask=mask)[0])
