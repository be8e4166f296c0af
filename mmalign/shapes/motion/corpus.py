"""Training data of the video model: seeded clips, drawn, encoded and captioned, cached in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Int16
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmalign.core.files import replacing
from mmalign.core.progress import track
from mmalign.shapes.motion.language import caption
from mmalign.shapes.motion.world import render, sample_clip

WORDINGS = 3
"""Captions of each clip."""


@dataclass
class ClipCorpus:
    """Latents of clips and the tokens of their captions."""

    latents: Float16[Tensor, "clips 4 9 16 16"]
    tokens: Int16[Tensor, "clips 3 length"]


def build_corpus(count: int, *, seed: int, vae: Any, tokenizer: Any) -> ClipCorpus:
    """Draw, encode and caption `count` training clips; the same arguments always give the same clips."""
    rng, latents, texts = np.random.default_rng([seed, 9]), [], []
    with track(count, "draw and encode clips") as job:
        for _ in range(count):
            clip = sample_clip(rng)
            texts += [caption(rng, clip) for _ in range(WORDINGS)]
            with torch.inference_mode():
                latents.append(vae.encode(render(clip).float().div(127.5).sub(1.0)).latents.transpose(0, 1).half())
            job.advance(1)
    tokens = torch.tensor(tokenizer(texts, padding="max_length", truncation=True).input_ids, dtype=torch.int16)
    return ClipCorpus(torch.stack(latents), tokens.unflatten(0, (count, WORDINGS)))


def cached_corpus(file: Path, count: int, *, seed: int, vae: Any, tokenizer: Any) -> ClipCorpus:
    """Read the corpus from `file` if it is there and of the same `count` and `seed`; else build it and write it."""
    made = {"clips": str(count), "seed": str(seed)}
    if file.is_file():
        with safe_open(file, "pt") as stored:
            if stored.metadata() == made:
                return ClipCorpus(stored.get_tensor("latents"), stored.get_tensor("tokens"))
    corpus = build_corpus(count, seed=seed, vae=vae, tokenizer=tokenizer)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file({"latents": corpus.latents.contiguous(), "tokens": corpus.tokens}, temporary, made)
    return corpus
