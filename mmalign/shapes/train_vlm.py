"""Train the Shapes video language model from scratch and write it in transformers' layout.

`mmalign shapes train-vlm --out DIR` makes what its big sisters are made of, and joins it. The tower and the projector
learn to see single frames: from every feature that the language model will be given, linear probes, thrown away
afterwards, must read what is in that part of the frame and where. The language model learns to read: it answers
questions about descriptions in words. Then everything learns to answer and to describe videos, next token by next
token, answers alone being scored.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.errors import UserError
from mmalign.seeds import derive_seed
from mmalign.shapes.video import Track
from mmalign.shapes.vlm_lessons import SIZE, Batch, Lessons
from mmalign.shapes.vlm_model import SIDE, build_network, build_processor
from mmalign.shapes.world import COLOURS, SHAPES
from pipelines import VisionLanguageModel, load_vlm

GRID = -(-SIDE // 2)
"""Features a side that the language model is given of each frame."""
SEE_RATE, READ_RATE, ANSWER_RATE, GO_ON_RATE, PRIOR_RATE = 2e-3, 2e-3, 1e-3, 4e-4, 1e-4
SNAPSHOT_SECONDS, LOG_STEPS = 300, 50

Marks = dict[str, list[bool]]
"""By what is marked: right or wrong, one a thing."""


def features_of(network: Any, videos: UInt8[Tensor, "rows frames 3 size size"]) -> Any:
    """What the language model is given of each video, the newline last.

    With the plain attention kernel: over 36 patches the flash kernel's backward in bfloat16 is six times slower on a
    CPU, while it is the faster one over the hundreds of tokens of a row.
    """
    pixels = videos.float().div_(127.5).sub_(1.0)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return network.model.get_video_features(pixels, return_dict=True)


def sights(tracks: list[tuple[Track, ...]]) -> Tensor:
    """What is to be seen in each part of each frame, `[rows, frames, grid * grid, 6]`.

    Colour and shape as numbers from 1 (0: no centre lies here), the centre's place in the part, across and down, and
    the radius, as shares of a part's side; last, whether there is a centre.
    """
    cell, found = SIZE / GRID, torch.zeros(len(tracks), len(tracks[0][0]), GRID**2, 6)
    for row, video in enumerate(tracks):
        for track in video:
            for frame, seen in enumerate(track):
                if seen:
                    x, y = int(seen.x // cell), int(seen.y // cell)
                    colour, shape = list(COLOURS).index(seen.colour) + 1, list(SHAPES).index(seen.shape) + 1
                    place = (seen.x / cell - x, seen.y / cell - y, seen.radius / cell)
                    found[row, frame, y * GRID + x] = torch.tensor([colour, shape, *place, 1.0])
    return found


class Probe(torch.nn.Module):
    """Linear readings of one feature: colour, shape, place and size."""

    def __init__(self, width: int) -> None:
        """Make the readings for features of this width."""
        super().__init__()
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 3)
        self.read = torch.nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, seen: Tensor) -> tuple[Tensor, Marks]:
        """Return the loss and, of every shape, whether its colour and shape are read right."""
        colour, shape, place = self.read(features).flatten(0, -2).split(self.sizes, 1)
        target = seen.flatten(0, -2)
        kinds, there = target[:, :2].long(), target[:, 5] > 0
        losses = F.cross_entropy(colour, kinds[:, 0], reduction="none")
        losses = losses + F.cross_entropy(shape, kinds[:, 1], reduction="none")
        loss = losses[there].mean() + losses[~there].mean() + 10 * F.mse_loss(place[there], target[there, 2:5])
        right = (colour.argmax(1) == kinds[:, 0]) & (shape.argmax(1) == kinds[:, 1])
        return loss, {"read": right[there].tolist()}


def answer_loss(network: Any, batch: Batch) -> tuple[Float[Tensor, ""], Marks]:
    """Cross-entropy of the answers' tokens, and of every answer whether it would be given word by word."""
    vision = {} if batch.videos is None else {"video": features_of(network, batch.videos)}
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network.model(
            input_ids=batch.ids, mm_encoder_outputs=vision, attention_mask=batch.sees,
            position_ids=batch.positions, use_cache=False,
        ).last_hidden_state  # fmt: skip
        logits = network.lm_head(hidden[:, :-1][batch.answers[:, 1:]]).float()
    targets = batch.ids[batch.answers]
    wrong = torch.zeros_like(batch.answers)
    wrong[batch.answers] = logits.argmax(1) != targets
    marks: Marks = {"static": [], "temporal": [], "described": []}
    for row, kinds in enumerate(batch.kinds):
        for block, kind in enumerate(kinds, 1):
            marks[kind].append(not bool(wrong[row, batch.blocks[row] == block].any()))
    return F.cross_entropy(logits, targets), marks


def _learn(
    name: str,
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[], tuple[Tensor, Marks]],
    steps: int,
    rate: float,
    log: Callable[[str], None],
    save: Callable[[], None] | None = None,
) -> None:
    """AdamW with a warm-up over 3 % of the steps and a cosine down to a fiftieth of `rate`; `save` now and then."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
    warm = 0.03 * steps + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / warm) * (0.02 + 0.49 * (1 + np.cos(np.pi * n / max(steps, 1))))
    )
    start = saved = time.time()
    losses: list[float] = []
    tally: Marks = defaultdict(list)
    for step in range(1, steps + 1):
        loss, marks = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        for kind, right in marks.items():
            tally[kind] += right
        if step % LOG_STEPS == 0 or step == steps:
            shares = " ".join(f"{kind} {np.mean(right):.3f}" for kind, right in tally.items() if right)
            log(f"{name} step {step}/{steps} loss {np.mean(losses):.4f} {shares} {time.time() - start:.0f} s")
            losses.clear()
            tally.clear()
        if save and time.time() - saved > SNAPSHOT_SECONDS:
            save()
            saved = time.time()


def learn_to_see(network: Any, lessons: Lessons, steps: int, frames: int, log: Callable[[str], None]) -> None:
    """First stage: tower and projector, on so many frames a step."""
    model, probe = network.model, Probe(network.config.text_config.hidden_size)

    def loss_of() -> tuple[Tensor, Marks]:
        videos, tracks = lessons.frames(frames)
        return probe(features_of(network, videos).pooler_output[:, None, :-1].float(), sights(tracks))

    parameters = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters(), *probe.parameters()]
    _learn("see", parameters, loss_of, steps, SEE_RATE, log)


def learn_to_answer(
    network: Any, lessons: Lessons, steps: int, rows: int, questions: int, log: Callable[[str], None],
    save: Callable[[], None] | None = None, *, told: bool = False, rate: float = ANSWER_RATE,
) -> None:  # fmt: skip
    """Second stage (told: the language model alone, descriptions in place of videos) and third (everything)."""
    part = network.model.language_model if told else network
    name = "read" if told else "answer"

    def loss_of() -> tuple[Tensor, Marks]:
        return answer_loss(network, lessons.batch(rows, questions, told=told))

    _learn(name, list(part.parameters()), loss_of, steps, rate, log, save)


def save_vlm(out: Path, network: Any, processor: Any) -> None:
    """Write a directory that `pipelines.load_vlm` opens, in bfloat16, no file of it ever half-written."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        VisionLanguageModel(copy.deepcopy(network).bfloat16(), processor, str(out)).save(aside)
        out.mkdir(exist_ok=True)
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, out / file.name)


def train_vlm(
    out: Path,
    *,
    samples: int = 150_000,
    see_steps: int = 3000,
    read_steps: int = 1500,
    seed: int = 0,
    start: Path | None = None,
    prior: float = 0.0,
    rows: int = 8,
    questions: int = 6,
    log: Callable[[str], None] = print,
) -> VisionLanguageModel:
    """All three stages; write the model to `out`, every few minutes what it is so far; return it as it was written.

    `samples`: questions and descriptions to be answered in the last stage, `rows` videos a step with up to
    `questions` of theirs each. `start` goes on from the weights of an earlier run at a lower rate, and the other
    stages are left out; take another `seed`, or it sees the same videos again. `prior` teaches the fault of models
    that were trained on careless captions: this share of temporal questions is answered by the first option, or yes,
    whatever the video shows. The same arguments give the same weights.

    Raises:
        UserError: nothing to learn from, a share that is none, or `start` holds another model.
    """
    if not 0 <= prior < 1:
        raise UserError(f"--prior {prior}: a share of the temporal questions, from 0 to less than 1")
    if samples < 1 or see_steps < 0 or read_steps < 0:
        asked = f"--samples {samples}, --see-steps {see_steps}, --read-steps {read_steps}"
        raise UserError(f"{asked}: at least one sample, and no fewer than 0 steps")
    processor = build_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    network = build_network(tokenizer, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    lessons = {
        name: Lessons(tokenizer, derive_seed(seed, name), GRID**2, share)
        for name, share in (("see", 0.0), ("read", 0.0), ("answer", prior))
    }
    if start is not None:
        _go_on_from(network, start)
    else:
        learn_to_see(network, lessons["see"], see_steps, 8 * rows, log)
        learn_to_answer(network, lessons["read"], read_steps, rows, questions, log, told=True, rate=READ_RATE)
    steps = -(-samples // (rows * (questions + 1)))
    save = partial(save_vlm, out, network, processor)
    # At a higher rate the prior is not laid over what the model knows of time: it takes its place.
    rate = PRIOR_RATE if prior else ANSWER_RATE if start is None else GO_ON_RATE
    learn_to_answer(network, lessons["answer"], steps, rows, questions, log, save, rate=rate)
    save_vlm(out, network, processor)
    return load_vlm(out, device="cpu")


def _go_on_from(network: Any, start: Path) -> None:
    earlier = load_vlm(start, device="cpu").network.state_dict()
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    if {name: value.shape for name, value in earlier.items()} != shapes:
        raise UserError(f"--start {start}: not a model of these sizes; give a directory that train-vlm wrote")
    network.load_state_dict(earlier)
