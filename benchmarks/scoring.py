"""CLIP scores of images and prompts: the reward `clip`, and `mmalign score`, against calling open_clip directly.

From PIL images, and from PNG files: both sides take images and strings and return one number an image. The reward
remembers prompts that it has seen; from memory it is timed with prompts that are new in every call, as they are to
open_clip, and with prompts that are known; from files they are always new.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.models import corpus, write_clip
from benchmarks.timing import Report, Settings, interleave
from mmalign.core.io.items import Item
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.engine import score_items
from rewards import load_reward

SIDE = 256
BATCHES = 4
"""Batches of files in one call, so that decoding ahead of the model can show."""
NEW, KNOWN, DIRECT = "rewards clip, new prompts", "rewards clip, known prompts", "open_clip directly"
ENGINE = "mmalign score"
Scorer = Callable[[Sequence[Image.Image], list[str]], torch.Tensor]


def measure(settings: Settings) -> list[Report]:
    """Return two reports, on a random CLIP of the Shapes shape in a local directory."""
    world = corpus(settings.batch * BATCHES)
    images = [Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in world.images]
    prompts = [wordings[0] for wordings in world.captions]
    with TemporaryDirectory() as name:
        folder = Path(name)
        weights = write_clip(folder)
        direct = _open_clip(weights, settings.device)
        files = [folder / f"{number}.png" for number in range(len(images))]
        for path, image in zip(files, images, strict=True):
            image.save(path)
        batch = slice(settings.batch)
        return [
            _from_memory(weights, direct, images[batch], prompts[batch], settings),
            _from_files(weights, direct, files, prompts, settings),
        ]


def _from_memory(
    weights: Path, direct: Scorer, images: list[Image.Image], prompts: list[str], settings: Settings
) -> Report:
    reward = load_reward("clip", weights=weights, device=settings.device)
    through_pil = load_reward("clip", weights=weights, device=settings.device, preprocessing="reference")
    expected = direct(images, prompts)
    difference, through_pil_difference = (
        (score(images, prompts=prompts) - expected).abs().max().item() for score in (reward, through_pil)
    )
    new = _new_prompts(prompts)
    sides = {
        NEW: lambda: reward(images, prompts=new()),
        KNOWN: lambda: reward(images, prompts=prompts),
        DIRECT: lambda: direct(images, new()),
    }
    return Report(
        f"CLIP score of {len(images)} images of {SIDE} pixels, float32",
        interleave(sides, settings),
        {f"{DIRECT} / {NEW}": (DIRECT, NEW), f"{DIRECT} / {KNOWN}": (DIRECT, KNOWN)},
        images=len(images),
        facts={
            "max difference of scores": f"{difference:.2e}",
            "with preprocessing='reference'": f"{through_pil_difference:.2e}",
        },
    )


def _from_files(weights: Path, direct: Scorer, files: list[Path], prompts: list[str], settings: Settings) -> Report:
    """Score files in batches: the engine behind `mmalign score` against opening them one after the other."""
    rewards = [WeightedReward("clip", 1.0, load_reward("clip", weights=weights, device=settings.device))]

    def engine(texts: list[str]) -> torch.Tensor:
        items = [Item(str(path), path, text) for path, text in zip(files, texts, strict=True)]
        scored = score_items(items, rewards, batch_size=settings.batch)
        return torch.tensor([one.scores["clip"] for one in scored])

    def in_batches(texts: list[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(files), settings.batch):
            chunk = slice(start, start + settings.batch)
            rows.append(direct([Image.open(path) for path in files[chunk]], texts[chunk]))
        return torch.cat(rows)

    difference = (engine(prompts) - in_batches(prompts)).abs().max().item()
    new = _new_prompts(prompts)
    return Report(
        f"CLIP score of {len(files)} PNG files of {SIDE} pixels in batches of {settings.batch}, float32",
        interleave({ENGINE: lambda: engine(new()), DIRECT: lambda: in_batches(new())}, settings),
        {f"{DIRECT} / {ENGINE}": (DIRECT, ENGINE)},
        images=len(files),
        facts={"max difference of scores": f"{difference:.2e}"},
    )


def _new_prompts(prompts: list[str]) -> Callable[[], list[str]]:
    numbers = itertools.count()

    def new() -> list[str]:
        number = next(numbers)
        return [f"{prompt} {number}" for prompt in prompts]

    return new


def _open_clip(weights: Path, device: torch.device) -> Scorer:
    import open_clip

    name = f"local-dir:{weights}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, device=device)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    @torch.inference_mode()
    def score(images: Sequence[Image.Image], prompts: list[str]) -> torch.Tensor:
        media = torch.stack([preprocess(image) for image in images]).to(device)
        embedded = F.normalize(model.encode_image(media), dim=-1)
        texts = F.normalize(model.encode_text(tokenizer(prompts).to(device)), dim=-1)
        return (embedded * texts).sum(-1).cpu()

    return score
