"""What is measured on: models of the shapes of the Shapes world's own, randomly initialised, and pictures of it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from mmalign.shapes.corpus import Corpus, build_corpus
from mmalign.shapes.tokenizer import build_tokenizer
from mmalign.shapes.train_base import build_scheduler, build_text_encoder, build_unet, build_vae, save_pipeline
from mmalign.shapes.train_clip import open_clip_config


@cache
def corpus(count: int) -> Corpus:
    """Return pictures with captions, always the same."""
    return build_corpus(count, wordings=1, workers=1)


def write_pipeline(folder: Path) -> Path:
    """Write a random `StableDiffusionPipeline` of the Shapes shape (6.7 M parameters in the UNet), float32."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    text_encoder, unet = build_text_encoder(len(tokenizer), tokenizer.eos_token_id), build_unet()
    save_pipeline(folder, build_vae(), text_encoder, tokenizer, unet, build_scheduler(), torch.float32)
    return folder


def write_clip(folder: Path) -> Path:
    """Write a random CLIP of the Shapes shape (1.7 M parameters) in open_clip's layout, float32."""
    import open_clip
    from safetensors.torch import save_file

    tokenizer = build_tokenizer(folder)
    config = open_clip_config(len(tokenizer), tokenizer.eos_token_id)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def write_pairs(folder: Path, count: int) -> Path:
    """Write `count` pairs of pictures and their list; which one is better does not matter for the speed."""
    folder.mkdir(parents=True)
    world, records = corpus(2 * count), []
    for index, picture in enumerate(world.images):
        Image.fromarray(picture).save(folder / f"{index}.png")
    for index in range(count):
        sides = {"chosen": f"{index}.png", "rejected": f"{count + index}.png"}
        records.append({"prompt": world.captions[index][0], **sides})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
