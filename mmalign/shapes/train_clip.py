"""Train the Shapes CLIP contrastively and write it in open_clip's layout.

A small contrastive model learns the relevant attributes by four means: every scene comes with a twin that differs in
one thing
(a shape, a colour, a count, a size, or which of the two is on the left), both in the same batch, each the other's hard
negative; captions that happen to be true of another image are no negatives of it; a linear probe, thrown away
afterwards, must read the number of objects of each kind from either embedding; and a share of images is repeated with
worse rendering and must fit less.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.shapes.agreement import Samples, read_samples
from mmalign.shapes.language import Query, groups_of, parse, split_of, write
from mmalign.shapes.oracle import Seen
from mmalign.shapes.prompts import asks_for_held_out
from mmalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer
from mmalign.shapes.train_base import to_batch
from mmalign.shapes.world import (
    COLOURS,
    INVERSE,
    QUALITIES,
    RADII,
    SHAPES,
    Object,
    Quality,
    Scene,
    inside,
    is_held_out,
    place,
    random_kind,
    render,
    sample_scene,
)

SEED = 21
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
COUNTS = 5
"""Counts: none to four of a kind."""
ANCHOR = 0.15
"""Share of the first stage's weights in the result; at 0.3 the agreement on generated images falls below 80 %."""
GROUP, SHIFT = 4, 2
"""Second stage: images of a prompt seen at once, and how far they may be moved, in pixels."""


def edit(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    """The scene with one thing changed, and which: `shape`, `colour`, `size`, `count` or `order`.

    Background and render quality stay, and no held-out combination is shown.
    """
    while True:
        kinds = ["shape"] * 4 + ["colour"] * 2 + ["count"] * 3 + ["size"] + ["order"] * 5 * bool(scene.relation)
        kind, at = str(rng.choice(kinds)), int(rng.integers(len(scene.objects)))
        changed = _EDITS[kind](rng, scene, at)
        if changed is None or not all(map(inside, changed.objects)) or is_held_out(changed):
            continue
        if all(np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for a, b in combinations(changed.objects, 2)):
            return changed, kind


def _with(scene: Scene, at: int, **changes: Any) -> Scene:
    objects = list(scene.objects)
    objects[at] = replace(objects[at], **changes)
    return replace(scene, objects=tuple(objects))


def _other(rng: np.random.Generator, choices: Any, not_this: str) -> str:
    return str(rng.choice([c for c in choices if c != not_this]))


def _other_shape(rng: np.random.Generator, scene: Scene, at: int) -> Scene:
    return _with(scene, at, shape=_other(rng, SHAPES, scene.objects[at].shape))


def _other_colour(rng: np.random.Generator, scene: Scene, at: int) -> Scene:
    return _with(scene, at, colour=_other(rng, COLOURS, scene.objects[at].colour))


def _other_size(rng: np.random.Generator, scene: Scene, at: int) -> Scene:
    size = _other(rng, RADII, scene.objects[at].size)
    return _with(scene, at, size=size, radius=float(rng.uniform(*RADII[size])))


def _other_count(rng: np.random.Generator, scene: Scene, at: int) -> Scene | None:
    objects: list[Object] | tuple[Object, ...] | None = list(scene.objects)
    if len(scene.objects) == 4 or (len(scene.objects) > 1 and rng.random() < 0.5):
        objects = scene.objects[:at] + scene.objects[at + 1 :]
    else:
        kinds = [(thing.shape, thing.colour, thing.size) for thing in scene.objects]
        objects = place(rng, [*kinds, kinds[at] if rng.random() < 0.5 else random_kind(rng)])
    return None if objects is None else replace(scene, objects=tuple(objects), relation=None)


def _other_order(rng: np.random.Generator, scene: Scene, at: int) -> Scene | None:
    assert scene.relation is not None
    (first, second), (a, relation, b) = scene.objects, scene.relation
    if relation == "next to":
        return None
    objects = replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)
    return replace(scene, objects=objects, relation=(a, INVERSE[relation], b))


_EDITS: dict[str, Callable[[np.random.Generator, Scene, int], Scene | None]] = {
    "shape": _other_shape, "colour": _other_colour, "size": _other_size,
    "count": _other_count, "order": _other_order,
}  # fmt: skip


def _wording(seed: list[int], scene: Scene, kind: str) -> str:
    """A training caption of everything in the scene; the same seed words a scene and its twin alike."""
    rng = np.random.default_rng(seed)
    groups = groups_of(scene, rng, size_named=1.0 if kind == "size" else 0.25)
    named = scene.relation is not None and len(groups) == 2 and (kind == "order" or rng.random() < 0.9)
    relations = (scene.relation,) if named and scene.relation is not None else ()
    query = Query(groups, relations, scene.background if rng.random() < 0.35 else None)
    while True:
        text = write(rng, query)
        if split_of(text) == "train":
            return text


class ClipCorpus(NamedTuple):
    """Scenes with their twins `[N, 2, 64, 64, 3]`, the scenes worse rendered `[N, 64, 64, 3]`, `N * W * 2` captions
    in that order, and how many of each of :data:`KINDS` there are, `[N, 2, 48]`."""

    images: np.ndarray
    worse: np.ndarray
    captions: list[str]
    contents: np.ndarray


def _chunk(arguments: tuple[int, int, int, int]) -> ClipCorpus:
    seed, index, count, wordings = arguments
    rng = np.random.default_rng([seed, index])
    images: list[list[np.ndarray]] = []
    worse, captions, contents = [], [], []
    while len(images) < count:
        scene = sample_scene(rng, crisp=0.6)
        twin, kind = edit(rng, scene)
        seeds = [[seed, index, len(images), w] for w in range(wordings)]
        texts = [(_wording(s, scene, kind), _wording(s, twin, kind)) for s in seeds]
        if any(a == b for a, b in texts):  # a change that the captions do not show, such as one size of two
            continue
        quality = Quality(str(rng.choice(QUALITIES[1:])), float(rng.random()))
        images.append([render(scene), render(twin)])
        worse.append(render(replace(scene, quality=quality)))
        captions += [text for pair in texts for text in pair]
        contents.append([_content(scene.objects), _content(twin.objects)])
    return ClipCorpus(np.array(images), np.array(worse), captions, np.array(contents))


def _content(objects: Iterable[Object | Seen]) -> np.ndarray:
    kinds = [(thing.colour, thing.shape) for thing in objects]
    found = np.array([KINDS.index(kind) for kind in kinds if kind in KINDS], dtype=int)
    return np.minimum(np.bincount(found, minlength=len(KINDS)), COUNTS - 1).astype(np.uint8)


def build_clip_corpus(count: int, *, seed: int = SEED, wordings: int = 3, workers: int = 2) -> ClipCorpus:
    """Draw training data; the same arguments (workers aside) always give the same corpus."""
    jobs = [(seed, i, min(1000, count - i * 1000), wordings) for i in range(-(-count // 1000))]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_chunk, jobs))
    images, worse, contents = (np.concatenate([getattr(p, n) for p in parts]) for n in ("images", "worse", "contents"))
    return ClipCorpus(images, worse, [c for p in parts for c in p.captions], contents)


def open_clip_config(vocabulary: int, end_token: int) -> dict[str, Any]:
    """Model and preprocessing of the Shapes CLIP: a small ResNet and a text transformer, about 3 M parameters."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24, "head_width": 64},
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
    out: Path,
    *,
    scenes: int = 50_000,
    steps: int = 5000,
    samples: Sequence[Path] = (),
    preference_steps: int = 4000,
    start: Path | None = None,
    anchor: Path | None = None,
    batch_size: int = 48,
    log: Callable[[str], None] = print,
) -> None:
    """Train from scratch and write `out` in open_clip's layout, half precision.

    With `samples` (what `mmalign pairs sample` wrote) a second stage follows: as in PickScore, the
    model learns which of two generated images shows its prompt better, with the oracle in place of people. `start`
    gives the weights of an earlier run, and the first stage is left out. `anchor`: a share of :data:`ANCHOR` of the
    result is that model's weights (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903): the second stage never compares
    captions, so the model would lose that ability. `batch_size` is in scenes: each brings its
    twin, and every fourth its worse rendered image; the second stage takes half as many prompts, four images each.
    """
    import open_clip

    tokenizer = build_tokenizer(out)
    config = open_clip_config(len(tokenizer), tokenizer.eos_token_id)
    torch.manual_seed(SEED)
    model = open_clip.CLIP(**config["model_cfg"]).to(memory_format=torch.channels_last)
    encode = partial(tokenizer, padding="max_length", truncation=True)
    if start is None:
        corpus = build_clip_corpus(scenes)
        log(f"corpus of {scenes} scenes and their twins drawn")
        _learn_scenes(model, corpus, encode, steps, batch_size, log)
    else:
        model.load_state_dict(load_file(start / "open_clip_model.safetensors"))
    if samples and preference_steps:
        _learn_preferences(model, read_samples(*samples), encode, preference_steps, batch_size, log)
    trained = model.state_dict()
    if anchor is not None:
        earlier = load_file(anchor / "open_clip_model.safetensors")
        trained = {name: torch.lerp(value.float(), earlier[name].float(), ANCHOR) for name, value in trained.items()}
    state = {name: value.detach().half().contiguous() for name, value in trained.items()}
    save_file(state, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2))


def _learn_scenes(
    model: Any, corpus: ClipCorpus, encode: Callable[..., Any], steps: int, batch_size: int, log: Callable[[str], None]
) -> None:
    """First stage: contrastive, on drawn scenes and their twins."""
    scenes = len(corpus.images)
    probe = torch.nn.Linear(model.visual.output_dim, len(KINDS) * COUNTS)
    tokens = torch.tensor(encode(corpus.captions).input_ids, dtype=torch.int16).view(scenes, -1, 2, MAX_LENGTH)
    rng = np.random.default_rng(SEED)

    def loss_of(_: int) -> tuple[Tensor, str]:
        index = rng.permutation(scenes)[:batch_size]
        media = np.concatenate([corpus.images[index].reshape(-1, *corpus.images.shape[2:]), corpus.worse[index[::4]]])
        words = tokens[index, rng.integers(tokens.shape[1], size=batch_size)].flatten(0, 1).long()
        contents = torch.from_numpy(corpus.contents[index]).flatten(0, 1).long()
        images, texts = _embed(model, media, words)
        loss = contrastive_loss(images, texts, contents, model.logit_scale.exp())
        loss = loss + 0.1 * (probe_loss(probe(images[: len(texts)]), contents) + probe_loss(probe(texts), contents))
        return loss, f"twins told apart {twin_accuracy(images, texts):.2f}"

    _train(model, [*model.parameters(), *probe.parameters()], loss_of, steps, 1e-3, log)


def _learn_preferences(
    model: Any, samples: Samples, encode: Callable[..., Any], steps: int, batch_size: int, log: Callable[[str], None]
) -> None:
    """Second stage: which of the generated images of a prompt is better, by correctness or, where equal, quality."""
    correct, quality = samples.correctness, samples.quality
    groups = [members for members in samples.groups() if preferred(correct[members], quality[members]).any()]
    log(f"{len(samples.images)} images, {len(groups)} prompts with a preference")
    prompts = [samples.prompts[members[0]] for members in groups]
    flips = [mirrored(prompt) for prompt in prompts]
    may_flip = np.array([split_of(text) == "train" and not asks_for_held_out(parse(text)) for text in flips])
    tokens = [torch.tensor(encode(texts).input_ids, dtype=torch.int16) for texts in (prompts, flips)]
    contents = np.stack([_content(reading.objects) for reading in samples.readings])
    probe = torch.nn.Linear(model.visual.output_dim, len(KINDS) * COUNTS)
    rng = np.random.default_rng(SEED)

    def loss_of(_: int) -> tuple[Tensor, str]:
        chosen = rng.permutation(len(groups))[: batch_size // 2]
        drawn = [rng.permutation(groups[group])[:GROUP] for group in chosen]
        index, owner = np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(d) for d in drawn])
        flip = may_flip[chosen] & (rng.random(len(chosen)) < 0.5)
        media = samples.images[index]
        media[flip[owner]] = media[flip[owner], :, ::-1]
        words = torch.stack([tokens[int(f)][group] for f, group in zip(flip, chosen, strict=True)])
        images, texts = _embed(model, shifted(media, *rng.integers(-SHIFT, SHIFT + 1, 2)), words.long())
        fit = model.logit_scale.exp() * F.cosine_similarity(images, texts[owner])
        better, worse = np.nonzero(preferred(correct[index], quality[index]) & (owner[:, None] == owner))
        margin = fit[better] - fit[worse]
        counted = probe_loss(probe(images), torch.from_numpy(contents[index]).long())
        loss = F.softplus(-margin).mean() + 0.05 * counted
        return loss, f"pairs told apart {(margin > 0).float().mean().item():.2f} probe {counted.item():.2f}"

    _train(model, [*model.parameters(), *probe.parameters()], loss_of, steps, 3e-4, log)


def preferred(correct: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Whether image i is better than j, `[N, N]`: clearly more correct or, if equally correct, clearly finer."""
    more, finer = (values[:, None] - values[None] for values in (correct, quality))
    return (more > 0.05) | ((np.abs(more) < 1e-6) & (finer > 0.1))


def mirrored(prompt: str) -> str:
    """The prompt of the mirrored image: left and right exchanged."""
    return re.sub("left|right", lambda word: "right" if word[0] == "left" else "left", prompt)


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """The images `[B, H, W, 3]` moved by some pixels, their border repeated."""
    height, width = images.shape[1:3]
    rows, columns = np.clip(np.arange(height) - down, 0, height - 1), np.clip(np.arange(width) - right, 0, width - 1)
    return images[:, rows][:, :, columns]


def _embed(model: Any, media: np.ndarray, words: Tensor) -> tuple[Tensor, Tensor]:
    """Embed images `[B, 64, 64, 3]` and token ids `[C, T]`, in bfloat16 as in train_base; returned in float32."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        pixels = to_batch(media).contiguous(memory_format=torch.channels_last)
        return model.encode_image(pixels).float(), model.encode_text(words).float()


def _train(
    model: Any,
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[int], tuple[Tensor, str]],
    steps: int,
    rate: float,
    log: Callable[[str], None],
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        loss, said = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 100 == 0 or step == steps - 1:
            log(f"step {step}/{steps} loss {loss.item():.3f} {said} {time.time() - start:.0f} s")


def contrastive_loss(images: Tensor, texts: Tensor, contents: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over scenes and their twins, plus each image above its worse rendering.

    images: `[2B + B / 4, D]`, scene and twin in turn, the worse images of every fourth scene last; texts: `[2B, D]`;
    contents: `[2B, 48]`. A caption of another scene with the same contents is likely true as well: no negative.
    """
    images, texts, count = F.normalize(images, dim=-1), F.normalize(texts, dim=-1), len(texts)
    logits, labels = scale * images @ texts.T, torch.arange(count)
    same = (contents[:, None] == contents[None]).all(-1) & (labels[:, None] // 2 != labels[None] // 2)
    pairs = logits[:count].masked_fill(same, -torch.inf)
    loss = 0.5 * (F.cross_entropy(pairs, labels) + F.cross_entropy(pairs.T, labels))
    worse = logits[count:].gather(1, labels[::8, None]).squeeze(1)
    return loss + 0.1 * F.softplus(worse - logits.diagonal()[::8]).mean()


def twin_accuracy(images: Tensor, texts: Tensor) -> float:
    """How often a caption fits its own image better than its twin's."""
    images = F.normalize(images[: len(texts)], dim=-1).view(-1, 2, images.shape[-1])
    fit = images @ F.normalize(texts, dim=-1).view_as(images).mT  # [B, image, caption]
    own = fit.diagonal(dim1=-2, dim2=-1)
    return (own > fit.flip(1).diagonal(dim1=-2, dim2=-1)).float().mean().item()


def probe_loss(logits: Tensor, contents: Tensor) -> Tensor:
    """Cross-entropy of the number of each kind, summed over kinds. logits: `[B, 48 * 5]`; contents: `[B, 48]`."""
    logits = logits.view(*contents.shape, COUNTS)
    return F.cross_entropy(logits.flatten(0, 1), contents.flatten(), reduction="sum") / len(contents)
