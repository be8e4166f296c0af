"""Train the Shapes CLIP contrastively and write it in open_clip's layout.

Two things make a small contrastive model see what matters here: hard negatives (each caption comes with a version
that is wrong in one thing: another colour, shape, count, relation or background) and a share of degraded pictures
whose crisp twin is the better match, so that render quality is not invisible to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.shapes.language import NUMBERS, Query, groups_of, split_of, write
from mmalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer
from mmalign.shapes.train_base import to_batch
from mmalign.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    QUALITIES,
    RELATIONS,
    SHAPES,
    Quality,
    render,
    sample_scene,
)

SEED = 21


def wrong(rng: np.random.Generator, query: Query) -> Query:
    """The same query with one thing changed: colour, shape, count, relation or background."""
    kinds = ["colour", "shape", "shape", "count"]
    kinds += ["relation"] * 2 * bool(query.relations) + ["background"] * bool(query.background)
    kinds += ["swap"] * (len(query.groups) == 2)
    kind, at = str(rng.choice(kinds)), int(rng.integers(len(query.groups)))
    groups, group = list(query.groups), query.groups[at]
    if kind == "relation":
        ((a, relation, b),) = query.relations
        other = (
            INVERSE[relation] if rng.random() < 0.6 else str(rng.choice([r for r in RELATIONS[:4] if r != relation]))
        )
        return replace(query, relations=((a, other if other != relation else "left of", b),))
    if kind == "background":
        return replace(query, background=str(rng.choice([b for b in BACKGROUNDS if b != query.background])))
    if kind == "swap":
        first, second = groups
        if first.colour != second.colour and first.shape != second.shape:
            swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
            return replace(query, groups=swapped)
        kind = "shape"
    if kind == "colour":
        groups[at] = replace(group, colour=str(rng.choice([c for c in COLOURS if c != group.colour])))
    elif kind == "shape":
        groups[at] = replace(group, shape=str(rng.choice([s for s in SHAPES if s != group.shape])))
    else:
        count = int(rng.choice([n for n in range(1, len(NUMBERS) + 1) if n != group.count]))
        groups[at] = replace(group, count=count)
    return replace(query, groups=tuple(groups))


class ClipCorpus(NamedTuple):
    """Pictures and their worse rendered twins `[N, 64, 64, 3]`, captions `[N * W]` and wrong captions `[N * W]`."""

    images: np.ndarray
    twins: np.ndarray
    captions: list[str]
    negatives: list[str]


def _chunk(arguments: tuple[int, int, int, int]) -> ClipCorpus:
    seed, index, count, wordings = arguments
    rng = np.random.default_rng([seed, index])
    images, twins, captions, negatives = [], [], [], []
    for _ in range(count):
        scene = sample_scene(rng, crisp=0.7)
        worse = Quality(str(rng.choice(QUALITIES[1:])), float(rng.random()))
        images.append(render(scene))
        twins.append(render(replace(scene, quality=worse)))
        for _ in range(wordings):
            groups = groups_of(scene, rng)
            relations = (scene.relation,) if scene.relation is not None and len(groups) == 2 else ()
            query = Query(groups, relations, scene.background if rng.random() < 0.35 else None)
            captions.append(_training_wording(rng, query))
            negatives.append(_training_wording(rng, wrong(rng, query)))
    return ClipCorpus(np.stack(images), np.stack(twins), captions, negatives)


def _training_wording(rng: np.random.Generator, query: Query) -> str:
    while True:
        text = write(rng, query)
        if split_of(text) == "train":
            return text


def build_clip_corpus(count: int, *, seed: int = SEED, wordings: int = 3, workers: int = 2) -> ClipCorpus:
    """Draw training data; the same arguments (workers aside) always give the same corpus."""
    jobs = [(seed, i, min(1000, count - i * 1000), wordings) for i in range(-(-count // 1000))]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_chunk, jobs))
    images, twins = (np.concatenate([getattr(p, name) for p in parts]) for name in ("images", "twins"))
    return ClipCorpus(images, twins, [c for p in parts for c in p.captions], [c for p in parts for c in p.negatives])


def open_clip_config(vocabulary: int, end_token: int) -> dict[str, Any]:
    """Model and preprocessing of the Shapes CLIP: a ViT on 8-pixel patches, about 1.7 M parameters."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "layers": 5, "width": 128, "head_width": 32, "patch_size": 8},
            "text_cfg": {
                "context_length": MAX_LENGTH, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 3,
                "hf_tokenizer_name": "shapes", "eos_id": end_token, "pool_type": "eos",
            },
        },
        "preprocess_cfg": {
            "mean": [0.5] * 3, "std": [0.5] * 3, "size": [64, 64],
            "interpolation": "bicubic", "resize_mode": "shortest",
        },
    }  # fmt: skip


def train_clip(
    out: Path, *, scenes: int = 40_000, steps: int = 4000, batch_size: int = 96, log: Callable[[str], None] = print
) -> None:
    """Train from scratch and write `out` in open_clip's layout, half precision. About 15 minutes on two CPU cores."""
    import open_clip

    tokenizer = build_tokenizer(out)
    config = open_clip_config(len(tokenizer), tokenizer.eos_token_id)
    corpus = build_clip_corpus(scenes)
    log(f"corpus of {scenes} scenes drawn")
    torch.manual_seed(SEED)
    model = open_clip.CLIP(**config["model_cfg"]).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    tokens = torch.tensor(
        tokenizer(corpus.captions, padding="max_length", truncation=True).input_ids, dtype=torch.int16
    )
    wrongs = torch.tensor(
        tokenizer(corpus.negatives, padding="max_length", truncation=True).input_ids, dtype=torch.int16
    )
    rng, wordings, start = np.random.default_rng(SEED), len(corpus.captions) // scenes, time.time()
    for step in range(steps):
        index = rng.integers(scenes, size=batch_size)
        text = index * wordings + rng.integers(wordings, size=batch_size)
        twin = index[: batch_size // 4]
        media = to_batch(np.concatenate([corpus.images[index], corpus.twins[twin]]))
        words = torch.cat([tokens[text], wrongs[text]]).long()
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # as in train_base
            images, texts = model.encode_image(media), model.encode_text(words)
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        loss = contrastive_loss(images, texts, model.logit_scale.exp(), batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 100 == 0 or step == steps - 1:
            log(f"clip step {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f} s")
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2))


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, count: int) -> torch.Tensor:
    """Symmetric InfoNCE with each picture's wrong caption among its candidates, plus crisp above its worse twin.

    images: `[B + B // 4, D]` unit, the twins of the first quarter last; texts: `[2B, D]` unit, the wrong ones last.
    """
    own, labels = images[:count], torch.arange(count)
    to_captions = scale * own @ texts[:count].T
    to_wrong = scale * (own * texts[count:]).sum(1, keepdim=True)
    loss = 0.5 * F.cross_entropy(torch.cat([to_captions, to_wrong], 1), labels) + 0.5 * F.cross_entropy(
        to_captions.T, labels
    )
    loss = loss + 0.5 * F.softplus(to_wrong.squeeze(1) - to_captions.diagonal()).mean()
    quarter = len(images) - count
    worse = scale * (images[count:] * texts[:quarter]).sum(1)
    return loss + 0.1 * F.softplus(worse - to_captions.diagonal()[:quarter]).mean()
