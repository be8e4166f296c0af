"""Tiny video pipelines made of real diffusers and transformers classes, as `tiny_models` makes those of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_t5

GEOMETRY = {"height": 16, "width": 16, "frames": 5, "fps": 8.0}
"""Small videos that the tiny models take: two latent frames of 2 x 2 for Wan's autoencoder."""


def tiny_wan_vae(channels: int = 4, **options: Any) -> Any:
    """Return an ``AutoencoderKLWan`` (sides / 8, frames / 4) with statistics that are neither 0 nor 1."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * channel - 0.2 for channel in range(channels)],
        latents_std=[0.5 + 0.25 * channel for channel in range(channels)],
        **options,
    ).eval()


def tiny_wan_transformer(channels: int = 4, width: int = 24, inputs: int | None = None, **options: Any) -> Any:
    """Return a ``WanTransformer3DModel`` of two layers."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=inputs or channels,
        out_channels=channels,
        text_dim=width,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **options,
    ).eval()


def tiny_clip_vision() -> tuple[Any, Any]:
    """Return a one-layer ``CLIPVisionModel`` of width 16 for images of 16 pixels a side, and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16, "image_size": 16, "patch_size": 8}
    config = CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return CLIPVisionModel(config).eval(), CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)


def tiny_umt5(folder: Path, width: int) -> tuple[Any, Any]:
    """Return a T5 tokenizer over characters and a one-layer ``UMT5EncoderModel`` for it."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer, _ = tiny_t5(folder, width)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    return tokenizer, UMT5EncoderModel(config).eval()


def build_tiny_wan(
    path: str | Path,
    *,
    unipc: bool = False,
    experts: bool = False,
    per_token: bool = False,
    from_image: bool = False,
    clip: bool = False,
    seed: int = 0,
) -> str:
    """Write a ``WanPipeline`` shaped like Wan 2.1 and return its path; shift 3, by Euler's scheduler or by UniPC.

    `experts` gives it the two of Wan 2.2 A14B, `per_token` the times and the autoencoder (sides / 16) of TI2V 5B;
    `from_image` makes it a ``WanImageToVideoPipeline``, with `clip` that of Wan 2.1, which sees CLIP's states too.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
    )

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = tiny_umt5(path / "tokenizer", 24)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        small = {
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "is_residual": True,
        }
        # Noisy latents, mask, latents of the first frame; per token the latter stand among the noisy ones.
        inputs = 4 + 4 + 4 if from_image and not per_token else None
        seen = {"image_dim": 16, "added_kv_proj_dim": 24} if clip else {}
        encoder_of, processor = tiny_clip_vision() if clip else (None, None)
        pipe = (WanImageToVideoPipeline if from_image else WanPipeline)(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=tiny_wan_vae(**small) if per_token else tiny_wan_vae(),
            scheduler=UniPCMultistepScheduler(**flow) if unipc else FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_wan_transformer(inputs=inputs, **seen),
            transformer_2=tiny_wan_transformer(inputs=inputs) if experts else None,
            boundary_ratio=0.875 if experts else None,
            expand_timesteps=per_token,
            **({"image_encoder": encoder_of, "image_processor": processor} if clip else {}),
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def build_tiny_ltx(path: str | Path, *, conditioned: bool = False, seed: int = 0) -> str:
    """Write an ``LTXPipeline`` (sides / 4, frames / 4) with the levels of LTX-Video and return its path.

    `conditioned` gives the autoencoder's decoder a noise level of its own.
    """
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    path, channels, width = Path(path), 8, 24
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = tiny_t5(path / "tokenizer", width)
        vae = AutoencoderKLLTXVideo(
            latent_channels=channels,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=conditioned,
            patch_size=1,
        )
        vae.latents_mean.copy_(torch.linspace(-0.3, 0.3, channels))
        vae.latents_std.copy_(torch.linspace(0.5, 1.5, channels))
        transformer = LTXVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=width,
        )
        shifts = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
        pipe = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shifts),
            vae=vae.eval(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def write_clip(
    path: Path, frames: int = 9, fps: float = 8.0, size: tuple[int, int] = (16, 16), level: int = 0, seed: int = 0
) -> Path:
    """Write an MP4 of random grey blocks, brighter by `level` of 255; its frames are (height, width) = `size`."""
    from mmalign.core.io.video_files import write_video

    path.parent.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(seed)
    coarse = torch.randint(level, 256, (frames, 1, 2, 2), generator=source).float()
    video = torch.nn.functional.interpolate(coarse, size).expand(-1, 3, -1, -1)
    write_video(path, video.to(torch.uint8), fps)
    return path
