"""Text to images by DDIM with guidance: ours against diffusers' own StableDiffusionPipeline.

Both start from prompts and seeds and end with images in [0, 1]; steps, guidance and batch are the same.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.models import corpus, write_pipeline
from benchmarks.timing import Report, Settings, interleave
from pipelines import load_generator, sample

GUIDANCE = 7.5
OURS, THEIRS = "mmalign", "diffusers"


def measure(settings: Settings) -> list[Report]:
    """Return a report in float32, and on a GPU one in float16 too."""
    dtypes = [torch.float32] + ([torch.float16] if settings.device.type == "cuda" else [])
    with TemporaryDirectory() as folder:
        model = write_pipeline(Path(folder))
        return [_compare(model, dtype, settings) for dtype in dtypes]


def _compare(model: Path, dtype: torch.dtype, settings: Settings) -> Report:
    prompts = [wordings[0] for wordings in corpus(settings.batch).captions]
    seeds = list(range(settings.batch))
    generator = load_generator(model, dtype=dtype, device=settings.device)
    pipe = _diffusers_pipeline(model, dtype, settings.device)

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        cond = generator.encode_prompts(prompts)
        trajectory = sample(generator, cond, steps=settings.steps, guidance=GUIDANCE, eta=0.0, seeds=seeds)
        return generator.decode(trajectory.latents)

    def theirs() -> torch.Tensor:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(
            prompts,
            num_inference_steps=settings.steps,
            guidance_scale=GUIDANCE,
            eta=0.0,
            generator=draws,
            output_type="pt",
        ).images

    images, expected = ours().float(), theirs().float()
    return Report(
        f"{settings.batch} images, {settings.steps} DDIM steps, guidance {GUIDANCE:g}, {str(dtype).split('.')[1]}",
        interleave({OURS: ours, THEIRS: theirs}, settings),
        {f"{THEIRS} / {OURS}": (THEIRS, OURS)},
        images=settings.batch,
        facts={
            "max difference of pixels": f"{(images - expected).abs().max().item():.2e}",
            "spread of pixels": f"{expected.std().item():.2e}",
        },
    )


def _diffusers_pipeline(model: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model).to(device, dtype)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe
