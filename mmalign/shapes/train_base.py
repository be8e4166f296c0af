"""Train the Shapes text-to-image pipeline from scratch: autoencoder, tokenizer, text encoder and denoiser.

`mmalign shapes train-base --out DIR` writes a plain diffusers `StableDiffusionPipeline` directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.core.ema import EMA
from mmalign.shapes.corpus import Corpus, build_corpus
from mmalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer

VAE_SEED, NETWORK_SEED = 11, 12
SNAPSHOT_SECONDS = 300


def to_batch(images: np.ndarray) -> Tensor:
    """uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def build_vae() -> Any:
    """AutoencoderTiny at f=4: 64x64 pixels to 16x16 latents of 4 channels, 0.26 M parameters."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(VAE_SEED)
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
        force_upcast=False,
    )


def train_vae(
    corpus: Corpus,
    steps: int,
    *,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    log: Callable[[str], None] = print,
) -> Any:
    """Fit the autoencoder: squared error, four times heavier on shapes than on the background.

    The latents are held near zero mean and unit variance per channel, so that the diffusion process needs no scaling,
    and carry a little noise, so that the decoder tolerates the denoiser's small errors.
    """
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng, generator, start = np.random.default_rng(VAE_SEED), torch.Generator().manual_seed(VAE_SEED), time.time()
    for step in range(steps):
        media = to_batch(corpus.images[rng.integers(len(corpus.images), size=batch_size)])
        background = media[:, :, :3, :3].mean((2, 3), keepdim=True)
        weight = 1.0 + 3.0 * ((media - background).abs().amax(1, keepdim=True) > 0.35)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(media).latents.float()
            noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(noisy).sample.float()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        error = (weight * (decoded - media) ** 2).mean()
        loss = error + 0.003 * (mean**2 + (std - 1) ** 2).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            psnr = -10 * np.log10(((decoded - media) ** 2).mean().item() / 4)
            log(f"vae step {step}/{steps} loss {loss.item():.5f} psnr {psnr:.1f} {time.time() - start:.0f} s")
    return vae.eval().requires_grad_(False)


def build_text_encoder(vocabulary: int, end_token: int) -> Any:
    """A CLIP text encoder of 0.7 M parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=end_token - 1, eos_token_id=end_token, pad_token_id=end_token,
        )
    )  # fmt: skip


def build_unet() -> Any:
    """A UNet of 6.7 M parameters over 16x16 latents, cross-attention at 8x8 and 4x4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def build_scheduler() -> Any:
    """Stable Diffusion's noise schedule with v-prediction and trailing timesteps."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=0, timestep_spacing="trailing",
    )  # fmt: skip


def build_flow_scheduler() -> Any:
    """Rectified flow, as plain diffusers samples it with a U-Net: DPM-Solver++ on the levels of flow matching."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
    )


@torch.inference_mode()
def encode_corpus(vae: Any, corpus: Corpus, batch_size: int = 32) -> Tensor:
    """Latents of every image, `[N, 4, 16, 16]`, float16."""
    parts = [
        vae.encode(to_batch(corpus.images[i : i + batch_size])).latents.half()
        for i in range(0, len(corpus.images), batch_size)
    ]
    return torch.cat(parts)


def train_denoiser(
    corpus: Corpus, latents: Tensor, vae: Any, out: Path, images: int, *,
    start: Path | None = None, flow: bool = False, batch_size: int = 64, learning_rate: float = 1e-3,
    dropout: float = 0.1, log: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Train UNet and text encoder jointly on v-prediction; writes the averaged pipeline to `out` every few minutes.

    `start`: a pipeline directory to start from (its weights alone; optimiser and schedule are new). `flow`: predict
    ``noise - x0`` of ``(1 - s) x0 + s noise`` instead, at logit-normal levels s, with 1000 s for the timestep.
    """
    seed = NETWORK_SEED + (start is not None)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(out / "tokenizer")
    text_encoder, unet, scheduler = (
        build_text_encoder(len(tokenizer), tokenizer.eos_token_id),
        build_unet(),
        build_flow_scheduler() if flow else build_scheduler(),
    )
    if start is not None:
        text_encoder.load_state_dict(load_file(start / "text_encoder" / "model.safetensors"))
        unet.load_state_dict(load_file(start / "unet" / "diffusion_pytorch_model.safetensors"))
    texts = [text for wordings in corpus.captions for text in wordings]
    tokens = torch.tensor(tokenizer([*texts, ""], padding="max_length", truncation=True).input_ids, dtype=torch.int16)
    wordings = len(corpus.captions[0])
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    steps = images // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * min(1.0, n / steps))))
    )
    ema, rng = EMA({str(i): p for i, p in enumerate(parameters)}, 0.999), np.random.default_rng(seed)
    began = saved = time.time()
    for step in range(steps):
        index = rng.integers(len(latents), size=batch_size)
        text = index * wordings + rng.integers(wordings, size=batch_size)
        text = np.where(rng.random(batch_size) < dropout, len(texts), text)
        x0, t = latents[index].float(), torch.from_numpy(rng.integers(1000, size=batch_size))
        noise = torch.randn_like(x0)
        if flow:
            t = 1000 * torch.randn(batch_size).sigmoid()
            level = (t / 1000).reshape(-1, 1, 1, 1)
            noisy, target = (1 - level) * x0 + level * noise, noise - x0
        else:
            noisy, target = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
        # Over so few tokens the plain kernel is the faster one on a CPU (`python -m benchmarks cpu_attention`).
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = text_encoder(tokens[text].long()).last_hidden_state
            output = unet(noisy, t, states).sample
        loss = F.mse_loss(output.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.update()
        if step % 100 == 0:
            rate = (step + 1) * batch_size / (time.time() - began)
            log(f"denoiser step {step}/{steps} loss {loss.item():.4f} {rate:.0f} images/s {time.time() - began:.0f} s")
        if step == steps - 1 or time.time() - saved > SNAPSHOT_SECONDS:
            saved = time.time()
            with ema.applied():
                save_pipeline(out, vae, text_encoder, tokenizer, unet, scheduler)


def save_pipeline(
    out: Path,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    unet: Any,
    scheduler: Any,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a diffusers `StableDiffusionPipeline` directory in half precision; the live weights stay as they are."""
    import copy

    from diffusers import StableDiffusionPipeline

    parts = {
        name: copy.deepcopy(module).to(dtype)
        for name, module in (("vae", vae), ("text_encoder", text_encoder), ("unet", unet))
    }
    pipeline: Any = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    tidy_vae_config(out)


def tidy_vae_config(out: Path) -> None:
    """Remove from the autoencoder's config in a saved pipeline what no reader needs."""
    config = out / "vae" / "config.json"
    # diffusers writes a key there that it warns about when it reads it, and the folder that the weights came from.
    unwanted = ("block_out_channels", "_name_or_path")
    values = {k: v for k, v in json.loads(config.read_text()).items() if k not in unwanted}
    config.write_text(json.dumps(values, indent=2) + "\n")


def train_base(
    out: Path,
    *,
    scenes: int = 60_000,
    vae_steps: int = 3600,
    images: int = 270_000,
    seed: int = 0,
    start: Path | None = None,
    flow: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """The whole recipe: corpus, autoencoder, denoiser; with `start`, only the denoiser, from a pipeline's weights.

    `flow`: a model of rectified flow.
    """
    from diffusers import AutoencoderTiny

    corpus = build_corpus(scenes, seed=seed)
    log(f"corpus of {scenes} scenes drawn")
    vae = AutoencoderTiny.from_pretrained(start / "vae") if start else train_vae(corpus, vae_steps, log=log)
    train_denoiser(corpus, encode_corpus(vae, corpus), vae, out, images, start=start, flow=flow, log=log)
