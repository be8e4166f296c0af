"""Flow models of diffusers' own pipelines, called as those pipelines call them: what tests compare ours with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_models import BuiltModels, build_tiny_flux, build_tiny_sd3, build_tiny_z_image
from tiny_qwen import build_tiny_flux2, build_tiny_qwen_image

from pipelines import load_generator
from pipelines.families.flux import pack, unpack
from pipelines.families.flux2 import patchify
from pipelines.families.qwen_image import masks_text
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
BUILDERS: dict[str, Callable[[Path], str]] = {
    "sd3": build_tiny_sd3,
    "sd3 t5": lambda path: build_tiny_sd3(path, t5=True),
    "flux": build_tiny_flux,
    "schnell": lambda path: build_tiny_flux(path, schnell=True),
    "z_image": build_tiny_z_image,
    "qwen_image": build_tiny_qwen_image,
    "flux2": build_tiny_flux2,
    "flux2 distilled": lambda path: build_tiny_flux2(path, distilled=True),
}
CLASSES = {"flux2": "Flux2KleinPipeline", "z_image": "ZImagePipeline", "qwen_image": "QwenImagePipeline"}
"""Pipelines that not every diffusers has."""
LENGTH = 64
OPTIONS = FlowOptions(image_size=16, text_length=LENGTH)


class Models(BuiltModels):
    """Models of `BUILDERS`; skips a test whose class is missing."""

    def __init__(self, folder: Path) -> None:
        """Build into `folder`."""
        super().__init__(folder, BUILDERS)

    def __missing__(self, name: str) -> str:
        """Build the model."""
        import diffusers

        wanted = CLASSES.get(name.split()[0])
        if wanted is not None and not hasattr(diffusers, wanted):
            pytest.skip(f"diffusers {diffusers.__version__} has no {wanted}")
        return super().__missing__(name)


def load(model: str, **options: Any) -> Any:
    """Return our generator for 16 x 16 images."""
    return load_generator(model, device="cpu", flow=OPTIONS, **options)


def load_pipe(model: str) -> Any:
    """Return diffusers' pipeline."""
    index = json.loads((Path(model) / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(model, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_for(name: str) -> torch.Tensor:
    """Return two samples of latents of a model of `BUILDERS` for 16 x 16 images."""
    return noise(2, 16, 4, 4) if name.startswith("flux2") else noise(2, 16, 8, 8)


def draw(pipe: Any, x: torch.Tensor, prompts: list[str] = PROMPTS, **options: Any) -> torch.Tensor:
    """Return the latents that the pipeline samples from noise `x`, not packed."""
    kind = type(pipe).__name__
    if kind == "QwenImagePipeline" and len(prompts) > 1 and not masks_text():
        return torch.cat([draw(pipe, x[[row]], prompts[row : row + 1], **options) for row in range(len(x))])
    packed = kind in ("FluxPipeline", "QwenImagePipeline")
    height, width = x.shape[-2:]
    pixels = 4 if kind == "Flux2KleinPipeline" else 2
    if kind == "ZImagePipeline":  # diffusers before 0.37 has another grid by default
        steps = options["num_inference_steps"]
        options |= {
            "sigmas": torch.linspace(1, 1 / steps, steps).tolist(),
            "guidance_scale": options["guidance_scale"] - 1,
        }
    if kind == "QwenImagePipeline":
        scale = options.pop("guidance_scale")
        options |= {"true_cfg_scale": scale, "negative_prompt": [" "] * len(prompts) if scale > 1 else None}
    made = pipe(
        prompt=list(prompts),
        latents=pack(x) if packed else x,
        height=pixels * height,
        width=pixels * width,
        max_sequence_length=LENGTH,
        output_type="latent",
        **options,
    ).images
    if kind == "Flux2KleinPipeline":
        bn = pipe.vae.bn
        std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().reshape(1, -1, 1, 1)
        return (patchify(made) - bn.running_mean.reshape(1, -1, 1, 1)) / std
    return unpack(made, height, width) if packed else made


def encode(pipe: Any, prompts: list[str] = PROMPTS) -> tuple[Any, Any]:
    """Return what the pipeline makes of prompts: embeddings (Z-Image: a list), and pooled ones, mask or positions."""
    options = {"prompt_2": None, "prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}
    encoded = pipe.encode_prompt(prompt=list(prompts), max_sequence_length=LENGTH, device="cpu", **options)
    return (encoded[0], encoded[2]) if options else encoded[:2]


def network_call(pipe: Any, x: torch.Tensor, t: torch.Tensor, embeds: Any, second: Any) -> torch.Tensor:
    """Return ``noise - x0`` as the pipeline asks its network for it, with its own conventions."""
    kind, height, width = type(pipe).__name__, *x.shape[-2:]
    if kind == "ZImagePipeline":
        found = pipe.transformer(list(x.unsqueeze(2)), (1000 - t) / 1000, embeds, return_dict=False)[0]
        return -torch.stack(found).squeeze(2)
    given: dict[str, Any] = {"encoder_hidden_states": embeds, "return_dict": False}
    if kind == "StableDiffusion3Pipeline":
        return pipe.transformer(hidden_states=x, timestep=t, pooled_projections=second, **given)[0]
    if kind == "Flux2KleinPipeline":
        given |= {"txt_ids": second, "img_ids": pipe._prepare_latent_ids(x), "guidance": None}
        tokens = pipe.transformer(hidden_states=pipe._pack_latents(x), timestep=t / 1000, **given)[0]
        return pipe._unpack_latents_with_ids(tokens, given["img_ids"])
    if kind == "QwenImagePipeline" and len(x) > 1 and not masks_text():
        rows = [(slice(row, row + 1), int(second[row].sum())) for row in range(len(x))]
        return torch.cat([network_call(pipe, x[one], t[one], embeds[one, :end], None) for one, end in rows])
    packed = pipe._pack_latents(x, len(x), 16, height, width)
    if kind == "QwenImagePipeline":
        given |= {"encoder_hidden_states_mask": second, "img_shapes": [[(1, height // 2, width // 2)]] * len(x)}
        given |= {} if masks_text() else {"txt_seq_lens": [embeds.shape[1]]}
        tokens = pipe.transformer(hidden_states=packed, timestep=t / 1000, **given)[0]
        return pipe._unpack_latents(tokens, 2 * height, 2 * width, 2).squeeze(2)
    given |= {
        "pooled_projections": second,
        "txt_ids": torch.zeros(LENGTH, 3),
        "img_ids": pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", None),
        "guidance": torch.tensor([3.5, 3.5]) if pipe.transformer.config.guidance_embeds else None,
    }
    tokens = pipe.transformer(hidden_states=packed, timestep=t / 1000, **given)[0]
    return pipe._unpack_latents(tokens, 2 * height, 2 * width, 2)


def moved(generator: Any, seed: int = 5) -> Any:
    """Return the generator with its trainable weights moved."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return generator
