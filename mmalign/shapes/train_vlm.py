"""Train the Shapes video language model from scratch and write it in transformers' layout.

`mmalign shapes train-vlm --out DIR` trains the parts of a large model and joins them, in stages. Read: the language
model answers questions in words, each after the sentence that answers it. See: the tower and the projector learn
single frames; every feature for the language model must encode the object in its part of the frame, in the language
model's own word embeddings, and its place. Look: the language model learns to find the object of a name in the video.
Answer: all parts learn to answer questions and to describe videos by next-token prediction, with the loss on answers
alone. Last, a language prior is added. In all stages linear probes supervise the hidden states that lead to an answer.
"""

from __future__ import annotations

import copy
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

from mmalign.core.errors import UserError
from mmalign.core.resources import resolve_model
from mmalign.core.seeds import derive_seed
from mmalign.shapes.vlm_lessons import Batch, Lessons
from mmalign.shapes.vlm_model import build_network, build_processor
from mmalign.shapes.vlm_probes import GRID, Marks, Probes, Sight, sights
from pipelines import VisionLanguageModel, load_vlm
from pipelines.saving import replacing_parts

SEE_RATE, READ_RATE, LOOK_RATE, ANSWER_RATE, GO_ON_RATE, PRIOR_RATE = 2e-3, 1e-3, 1e-3, 4e-4, 2e-4, 1e-4
PRIOR_STEPS = 120
MATRIX_FACTOR = 5
"""Factor of the learning rate of the language model's inner matrices, with Muon, over that of other weights."""
PROBE_WEIGHT = 0.5
HINT_EVERY = 4
"""Share of reading in the steps of the stage "look", so that reading is not forgotten."""
SNAPSHOT_SECONDS, LOG_STEPS = 300, 50

Log = Callable[[str], None]


def features_of(network: Any, videos: UInt8[Tensor, "rows frames 3 size size"]) -> Any:
    """The features of each video for the language model, the newline last.

    With the plain attention kernel: over 36 patches the flash kernel's backward in bfloat16 is six times slower on a
    CPU, while it is the faster one over the hundreds of tokens of a row.
    """
    pixels = videos.float().div_(127.5).sub_(1.0)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return network.model.get_video_features(pixels, return_dict=True)


def lesson_loss(network: Any, batch: Batch, probes: Probes | None = None) -> tuple[Float[Tensor, ""], Marks]:
    """Mean over lessons of the mean cross-entropy of the answer's tokens; and whether each answer is the likeliest.

    With `probes`, half their loss is added, and their marks; without lessons theirs is the whole loss.
    """
    vision = {} if batch.videos is None else {"video": features_of(network, batch.videos)}
    with torch.autocast("cpu", torch.bfloat16):
        out = network.model(
            input_ids=batch.ids, mm_encoder_outputs=vision, attention_mask=batch.sees,
            position_ids=batch.positions, use_cache=False, output_hidden_states=probes is not None,
        )  # fmt: skip
        logits = network.lm_head(out.last_hidden_state[:, :-1][batch.answers[:, 1:]]).float()
    loss, marks = torch.zeros(()), defaultdict(list)
    taught = [one for lessons in batch.lessons for one in lessons]
    if taught:
        targets, at = batch.ids[batch.answers], batch.answers.nonzero()[:, 0]
        lesson = torch.stack([at, batch.blocks[batch.answers]], 1).unique(dim=0, return_inverse=True)[1]
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses / torch.bincount(lesson)[lesson]).sum() / len(taught)
        wrong = torch.zeros(len(taught)).index_add_(0, lesson, (logits.argmax(1) != targets).float())
        for one, errors in zip(taught, wrong.tolist(), strict=True):
            marks[one.kind].append(not errors)
    if probes is None:
        return loss, dict(marks)
    read, right = probes(out.hidden_states, batch)
    return loss + PROBE_WEIGHT * read, {**marks, **right}


def _optimizers(modules: list[torch.nn.Module], matrices: list[Tensor], rate: float) -> list[torch.optim.Optimizer]:
    """AdamW, and for `matrices` Muon (Jordan et al. 2024; steps scaled as in Liu et al. 2025, arXiv:2502.16982)."""
    taken = {id(matrix) for matrix in matrices}
    rest = [value for module in modules for value in module.parameters() if id(value) not in taken]
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
    if not matrices:
        return [adam]
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"train-vlm needs torch 2.9 or newer for its optimizer Muon; this is {torch.__version__}")
    muon = torch.optim.Muon(
        matrices, lr=MATRIX_FACTOR * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    return [adam, muon]


def _learn(
    name: str,
    modules: list[torch.nn.Module],
    loss_of: Callable[[int], tuple[Tensor, Marks]],
    steps: int,
    rate: float,
    log: Log,
    *,
    matrices: list[Tensor] | None = None,
    save: Callable[[], None] | None = None,
) -> None:
    """Minimise `loss_of(step)`, with a warm-up over 3 % of the steps and a cosine down to a fiftieth of `rate`.

    `matrices`: those of the modules' weights that Muon takes. `save` now and then.
    """
    optimizers = _optimizers(modules, matrices or [], rate)
    warm = 0.03 * steps + 1
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(1.0, (n + 1) / warm) * (0.02 + 0.49 * (1 + np.cos(np.pi * n / max(steps, 1))))
        )
        for optimizer in optimizers
    ]
    parameters = [value for module in modules for value in module.parameters()]
    start = saved = time.time()
    losses: list[float] = []
    tally: Marks = defaultdict(list)
    for step in range(1, steps + 1):
        loss, marks = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        for kind, right in marks.items():
            tally[kind] += right
        if step % LOG_STEPS == 0 or step == steps:
            shares = " ".join(f"{kind} {np.mean(right):.2f}" for kind, right in sorted(tally.items()) if right)
            log(f"{name} step {step}/{steps} loss {np.mean(losses):.4f} {shares} {time.time() - start:.0f} s")
            losses.clear()
            tally.clear()
        if save and time.time() - saved > SNAPSHOT_SECONDS:
            save()
            saved = time.time()


def _inner_matrices(module: torch.nn.Module) -> list[Tensor]:
    return [one.weight for one in module.modules() if isinstance(one, torch.nn.Linear)]


def learn_to_read(
    network: Any, lessons: Lessons, probes: Probes, steps: int, rows: int, questions: int, log: Log
) -> None:
    """First stage: the language model, on questions after the sentence that answers them."""
    model = network.model.language_model

    def loss_of(step: int) -> tuple[Tensor, Marks]:
        return lesson_loss(network, lessons.batch(rows, questions, with_hint=True), probes)

    _learn("read", [model, probes], loss_of, steps, READ_RATE, log, matrices=_inner_matrices(model))


def learn_to_see(network: Any, lessons: Lessons, probes: Probes, steps: int, frames: int, log: Log) -> None:
    """Second stage: tower and projector, on `frames` frames a step, with the language model's word embeddings."""
    model = network.model
    sight = Sight(model.get_input_embeddings().weight[probes.names.ids])

    def loss_of(step: int) -> tuple[Tensor, Marks]:
        videos, tracks = lessons.frames(frames)
        return sight(features_of(network, videos).pooler_output[:, None, :-1].float(), sights(tracks))

    _learn("see", [model.vision_tower, model.multi_modal_projector, sight], loss_of, steps, SEE_RATE, log)


def learn_to_look(
    network: Any, lessons: Lessons, probes: Probes, steps: int, rows: int, questions: int, log: Log
) -> None:
    """Third stage: the language model, on videos and, of each, every name by itself; every fourth step, on reading."""
    model, names = network.model.language_model, probes.names.ids.tolist()

    def loss_of(step: int) -> tuple[Tensor, Marks]:
        if step % HINT_EVERY == 0:
            return lesson_loss(network, lessons.batch(rows, questions, with_hint=True), probes)
        return lesson_loss(network, lessons.names_after_videos(4 * rows, names), probes)

    seeing = (network.model.vision_tower, network.model.multi_modal_projector)
    for part in seeing:
        part.requires_grad_(False)
    _learn("look", [model, probes], loss_of, steps, LOOK_RATE, log, matrices=_inner_matrices(model))
    for part in seeing:
        part.requires_grad_(True)


def learn_to_answer(
    network: Any, lessons: Lessons, probes: Probes | None, steps: int, rows: int, questions: int, log: Log,
    save: Callable[[], None] | None = None, *, name: str = "answer", rate: float = ANSWER_RATE,
) -> None:  # fmt: skip
    """Fourth stage, and the last: everything, on questions about videos."""
    modules = [network.model, probes] if probes else [network.model]

    def loss_of(step: int) -> tuple[Tensor, Marks]:
        return lesson_loss(network, lessons.batch(rows, questions), probes)

    matrices = _inner_matrices(network.model.language_model)
    _learn(name, modules, loss_of, steps, rate, log, matrices=matrices, save=save)


def save_vlm(out: Path, network: Any, processor: Any) -> None:
    """Write a directory that `pipelines.load_vlm` opens, in bfloat16, no file of it ever half-written."""
    with replacing_parts(out, "config.json") as aside:
        VisionLanguageModel(copy.deepcopy(network).bfloat16(), processor, str(out)).save(aside)


def train_vlm(
    out: Path,
    *,
    samples: int = 84_000,
    read_steps: int = 1200,
    see_steps: int = 3000,
    look_steps: int = 600,
    seed: int = 0,
    start: Path | None = None,
    prior: float = 0.5,
    rows: int = 8,
    questions: int = 6,
    log: Log = print,
) -> VisionLanguageModel:
    """All stages; write the model to `out`, in the stage "answer" every few minutes; return what was written.

    `samples`: questions and descriptions to be answered in the fourth stage, `rows` videos a step with up to
    `questions` of theirs each. `start` gives the weights of an earlier run, for a lower rate without probes, and the
    first three stages are left out; take another `seed` for other videos. `prior` adds a short last stage that teaches
    the language prior of models trained on careless captions: this share of temporal questions is answered by the
    first option, or yes, whatever the video shows. The same arguments give the same
    weights on the same processor with as many threads; elsewhere sums round differently, and trainings diverge.

    Raises:
        UserError: a size is too small, a share is out of range, `start` holds another model, or torch has no Muon.
    """
    if not 0 <= prior < 1:
        raise UserError(f"--prior {prior}: a share of the temporal questions, from 0 to less than 1")
    if min(samples, rows, questions) < 1 or min(read_steps, see_steps, look_steps) < 0:
        asked = f"--samples {samples}, --read-steps {read_steps}, --see-steps {see_steps}, --look-steps {look_steps}"
        raise UserError(f"{asked}: at least one sample, row and question, and no fewer than 0 steps")
    processor = build_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    network = build_network(tokenizer, seed)
    lessons = {
        name: Lessons(tokenizer, derive_seed(seed, name), GRID**2, share)
        for name, share in (("read", 0.0), ("see", 0.0), ("look", 0.0), ("answer", 0.0), ("prior", prior))
    }
    probes = None
    if start is not None:
        _go_on_from(network, start)
    else:
        probes = Probes(network.config.text_config.hidden_size, tokenizer)
        learn_to_read(network, lessons["read"], probes, read_steps, rows, questions, log)
        learn_to_see(network, lessons["see"], probes, see_steps, 8 * rows, log)
        learn_to_look(network, lessons["look"], probes, look_steps, rows, questions, log)
    steps = -(-samples // (rows * (questions + 1)))
    save = partial(save_vlm, out, network, processor)
    rate = ANSWER_RATE if start is None else GO_ON_RATE
    learn_to_answer(network, lessons["answer"], probes, steps, rows, questions, log, save, rate=rate)
    save()
    if prior:
        # At a higher rate the prior would replace the model's temporal knowledge instead of adding to it.
        learn_to_answer(
            network, lessons["prior"], probes, PRIOR_STEPS, rows, questions, log, name="prior", rate=PRIOR_RATE
        )
        save()
    return load_vlm(out, device="cpu")


def _go_on_from(network: Any, start: Path) -> None:
    earlier = load_vlm(resolve_model(str(start)), device="cpu").network.state_dict()
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    if {name: value.shape for name, value in earlier.items()} != shapes:
        raise UserError(f"--start {start}: not a model of these sizes; give a directory that train-vlm wrote")
    network.load_state_dict(earlier)
