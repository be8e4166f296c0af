"""Tiny AnimateDiff and CogVideoX pipelines of the real classes, for tests; see `tiny_models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import build_tiny_sd, tiny_scheduler, tiny_t5

FRAMES = 5
LENGTH = 16
"""Tokens of the tiny CogVideoX's texts."""


def tiny_motion_adapter(**options: Any) -> Any:
    """Return a ``MotionAdapter`` for the U-Net of `build_tiny_sd`, whose modules change what it predicts."""
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
        **options,
    )
    return adapter.eval()


def build_tiny_animatediff(path: str | Path, prediction_type: str = "epsilon", *, seed: int = 0) -> str:
    """Write an ``AnimateDiffPipeline`` for up to 8 frames of 16x16 pixels and return its path.

    ``prediction_type="flow_prediction"`` gives it the scheduler of a U-Net of rectified flow.
    """
    from diffusers import AnimateDiffPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline

    base = StableDiffusionPipeline.from_pretrained(build_tiny_sd(Path(f"{path}-base"), seed=seed))
    flow = prediction_type == "flow_prediction"
    options: dict[str, Any] = {"prediction_type": prediction_type}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        pipe = AnimateDiffPipeline(
            **{name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet")},
            motion_adapter=tiny_motion_adapter(),
            scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=1.0, **options)
            if flow
            else tiny_scheduler(prediction_type),
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def tiny_cogvideox_vae(**options: Any) -> Any:
    """Return an ``AutoencoderKLCogVideoX`` of 16 channels that halves the sides and keeps one frame of four."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        **options,
    ).eval()


def build_tiny_cogvideox(path: str | Path, version: str = "5b", *, from_image: bool = False, seed: int = 0) -> str:
    """Write a ``CogVideoXPipeline`` for 9 frames of 16x16 pixels (latents ``[4, 3, 2, 2]``) and return its path.

    "2b" has sine positions and a signal-to-noise ratio shifted by 3; "5b" rotary positions; "1.5" patches of two
    frames. `from_image` makes it a ``CogVideoXImageToVideoPipeline``: 5B with learned positions, 1.5 with ``ofs``.
    """
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = tiny_t5(path / "tokenizer", 24)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8 if from_image else 4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=24,
            num_layers=2,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            patch_size_t=2 if version == "1.5" else None,
            patch_bias=version != "1.5",
            max_text_seq_length=LENGTH,
            use_rotary_positional_embeddings=version != "2b",
            use_learned_positional_embeddings=from_image and version == "5b",
            ofs_embed_dim=8 if from_image and version == "1.5" else None,
        )
        if from_image and version == "5b":
            transformer.patch_embed.pos_embedding.normal_(std=0.1)
        kind = CogVideoXDDIMScheduler if version == "2b" else CogVideoXDPMScheduler
        pipe = (CogVideoXImageToVideoPipeline if from_image else CogVideoXPipeline)(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=tiny_cogvideox_vae(invert_scale_latents=from_image and version == "1.5"),
            transformer=transformer.eval(),
            scheduler=kind(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=3.0 if version == "2b" else 1.0,
                timestep_spacing="trailing",
            ),
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)
