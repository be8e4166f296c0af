"""One Diffusion-DPO optimiser step: ours, the public scripts' recipe, and the least work that the method needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from benchmarks.models import corpus, write_pairs, write_pipeline
from benchmarks.public_recipe import recipe_step
from benchmarks.timing import Report, Settings, interleave
from mmalign.config.run import RunConfig
from mmalign.config.sections import AdapterConfig, DataConfig, TrainerConfig
from mmalign.core.precision import DTYPES, Precision
from mmalign.shapes.train_base import to_batch
from mmalign.training.accelerator import make_accelerator
from mmalign.training.optim import build_optimizer
from mmalign.training.prepare import Prepared, prepare

PRECISION: Precision = "bf16"
BETA, LEARNING_RATE, MAX_GRAD_NORM = 1000.0, 1e-5, 1.0
OURS, RECIPE, BOUND = "mmalign", "public recipe", "lower bound"


def measure(settings: Settings) -> list[Report]:
    """Return a report for LoRA and one for full fine-tuning."""
    with TemporaryDirectory() as folder:
        model = write_pipeline(Path(folder, "model"))
        pairs = write_pairs(Path(folder, "pairs"), settings.batch)
        return [_compare("lora", model, pairs, settings), _compare("full", model, pairs, settings)]


def _compare(kind: Literal["lora", "full"], model: Path, pairs: Path, settings: Settings) -> Report:
    from diffusers import StableDiffusionPipeline

    config = RunConfig(
        model=str(model),
        method={"name": "diffusion_dpo", "beta": BETA},
        data=DataConfig(pairs=str(pairs), cache=str(pairs.parent / "cache")),
        adapter=AdapterConfig(kind=kind),
        trainer=TrainerConfig(batch_size=settings.batch, learning_rate=LEARNING_RATE, precision=PRECISION),
        output=str(pairs.parent / "output"),
    )
    accelerator = make_accelerator(config)
    ours, theirs = prepare(config, accelerator), prepare(config, accelerator)
    world = corpus(2 * settings.batch)
    recipe = recipe_step(
        theirs.run,
        StableDiffusionPipeline.from_pretrained(model).to(settings.device),
        to_batch(world.images),
        [wordings[0] for wordings in world.captions[: settings.batch]],
        dtype=DTYPES[PRECISION],
        beta=BETA,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
    )
    sides = {OURS: _our_step(ours, accelerator), RECIPE: recipe, BOUND: _bound_step(theirs)}
    return Report(
        f"Diffusion-DPO optimiser step, {kind}, {settings.batch} pairs, {PRECISION}",
        interleave(sides, settings),
        {f"{RECIPE} / {OURS}": (RECIPE, OURS), f"{OURS} / {BOUND}": (OURS, BOUND)},
        images=2 * settings.batch,
    )


def _our_step(parts: Prepared, accelerator: Any) -> Callable[[], None]:
    """Return the engine's step without its logging: cached batch, method, clipping, optimiser."""
    parameters, count = parts.run.generator.trainable_parameters(), itertools.count()
    optimizer = build_optimizer(parameters, learning_rate=LEARNING_RATE)

    def step() -> None:
        for batch in parts.sampler.micro_batches(next(count)):
            accelerator.backward(parts.method.loss(parts.run, batch).loss)
        accelerator.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _bound_step(parts: Prepared) -> Callable[[], None]:
    """Return forward and backward on 2B images and one forward of the reference: no data, loss or optimiser."""
    generator, autocast = parts.run.generator, parts.run.autocast
    parameters = generator.trainable_parameters()
    batch = next(parts.sampler.micro_batches(0))
    x, states = (torch.cat([part, part]) for part in (batch.chosen, batch.cond.prompt_embeds))
    t = torch.full((len(x),), 500, device=x.device)

    def step() -> None:
        with autocast():
            output = generator.network(x, t, states).sample
        output.float().sum().backward()
        with parts.run.reference.active(), autocast():
            generator.network(x, t, states)
        for parameter in parameters:
            parameter.grad = None

    return step
