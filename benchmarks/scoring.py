"""CLIP scores of images and prompts: the reward `clip` against calling open_clip directly.

Both take PIL images and strings and return one number an image. The reward remembers prompts that it has seen; it is
timed with prompts that are new in every call, as open_clip is, and with prompts that are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.models import corpus, write_clip
from benchmarks.timing import Report, Settings, interleave
from rewards import load_reward

SIDE = 256
NEW, KNOWN, DIRECT = "rewards clip, new prompts", "rewards clip, known prompts", "open_clip directly"
Scorer = Callable[[list[str]], torch.Tensor]


def measure(settings: Settings) -> list[Report]:
    """Return one report, on a random CLIP of the Shapes shape in a local directory."""
    world = corpus(settings.batch)
    images = [Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in world.images]
    prompts = [wordings[0] for wordings in world.captions]
    with TemporaryDirectory() as folder:
        weights = write_clip(Path(folder))
        reward = load_reward("clip", weights=weights, device=settings.device)
        through_pil = load_reward("clip", weights=weights, device=settings.device, preprocessing="reference")
        direct = _open_clip(weights, images, settings.device)
    expected = direct(prompts)
    difference, through_pil_difference = (
        (score(images, prompts=prompts) - expected).abs().max().item() for score in (reward, through_pil)
    )
    numbers = itertools.count()

    def new() -> list[str]:
        number = next(numbers)
        return [f"{prompt} {number}" for prompt in prompts]

    sides = {
        NEW: lambda: reward(images, prompts=new()),
        KNOWN: lambda: reward(images, prompts=prompts),
        DIRECT: lambda: direct(new()),
    }
    return [
        Report(
            f"CLIP score of {settings.batch} images of {SIDE} pixels, float32",
            interleave(sides, settings),
            {f"{DIRECT} / {NEW}": (DIRECT, NEW), f"{DIRECT} / {KNOWN}": (DIRECT, KNOWN)},
            images=settings.batch,
            facts={
                "max difference of scores": f"{difference:.2e}",
                "with preprocessing='reference'": f"{through_pil_difference:.2e}",
            },
        )
    ]


def _open_clip(weights: Path, images: list[Image.Image], device: torch.device) -> Scorer:
    import open_clip

    name = f"local-dir:{weights}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, device=device)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    @torch.inference_mode()
    def score(prompts: list[str]) -> torch.Tensor:
        media = torch.stack([preprocess(image) for image in images]).to(device)
        embedded = F.normalize(model.encode_image(media), dim=-1)
        texts = F.normalize(model.encode_text(tokenizer(prompts).to(device)), dim=-1)
        return (embedded * texts).sum(-1).cpu()

    return score
