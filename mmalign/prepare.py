"""From a configuration to the parts of a run, in the order that spares memory: check, encode, free encoders, adapt.

Everything that can be known to fail fails here, the cheap checks before the first weight is read.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config_files import flatten
from mmalign.errors import UserError
from mmalign.feed import PairFeed
from mmalign.files import check_output
from mmalign.methods.base import Method
from mmalign.optim import warmup_steps
from mmalign.precision import autocast, check_precision, round_frozen
from mmalign.progress import note, track
from mmalign.reference import Reference
from mmalign.resources import resolve_model, resource_root
from mmalign.run import Run
from mmalign.seeds import derive_seed
from mmalign.validation import Validation, check_evaluation

if TYPE_CHECKING:
    from mmalign.config import RunConfig
    from mmalign.data.cache import CachedPairs
    from mmalign.data.pairs import PairTable


@dataclass
class Prepared:
    """The parts of a run, ready for the loop."""

    method: Method[Any]
    run: Run
    feed: PairFeed
    validation: Validation | None
    data_id: str
    """Identifies what is learned from: ids, prompts and images on either side, not the path."""
    model_id: str
    """Identifies the model that training starts from by its content."""


@dataclass
class Plan:
    """What a run will do, in numbers."""

    method: str
    samples: int
    steps: int
    samples_per_step: int
    images_per_step: int
    epochs: float
    trainable: int
    parameters: int
    warmup: int
    data: str

    def __str__(self) -> str:
        """Return the plan as indented lines."""
        passes = f"{self.epochs:.2f} passes" if self.epochs < 10 else f"{self.epochs:.0f} passes"
        share = 100 * self.trainable / self.parameters
        return "\n".join(
            [
                f"  method     {self.method}",
                f"  data       {self.data}",
                f"  steps      {self.steps} of {self.samples_per_step} samples ({self.images_per_step} images) each: "
                f"{passes} over the data; warm-up {self.warmup} steps",
                f"  trainable  {self.trainable:,} of {self.parameters:,} parameters ({share:.3g} %)",
            ]
        )


def build_method(config: RunConfig) -> Method[Any]:
    """Return the method that a configuration names."""
    from mmalign.methods import methods

    chosen = methods.get(config.method_name)
    method: Method[Any] = chosen(chosen.Config(**config.method_options))
    return method


def complete(config: RunConfig) -> RunConfig:
    """Return the configuration with the method's own defaults filled in, as `load_config` already does."""
    options = build_method(config).config.model_dump(mode="json")
    return config.model_copy(update={"method": {"name": config.method_name, **options}})


def check(config: RunConfig, method: Method[Any], device: Any) -> None:
    """Refuse what cannot work, before any weight is read.

    Raises:
        UserError: names the key and the fix.
    """
    if method.needs.source != "pairs":
        raise UserError(
            f"method '{config.method_name}' learns from {method.needs.source}, and `mmalign train` deals out pairs; "
            "choose a method that learns from pairs (`mmalign list methods`)"
        )
    output = Path(config.output)
    check_output(output, "output")
    if config.data.cache:
        check_output(Path(config.data.cache).expanduser(), "data.cache")
    check_precision(config.trainer.precision, device)
    resolve_model(config.model)
    if config.evaluate:
        check_evaluation(config.evaluate)
    other = "model_index.json" if config.adapter.kind == "lora" else "pytorch_lora_weights.safetensors"
    if (output / other).exists():
        raise UserError(
            f"output {output} holds {other} of a run with another adapter.kind; choose another output or remove it"
        )


def load_table(config: RunConfig) -> PairTable:
    """Return the pairs of the configuration, not yet read as images."""
    from mmalign.data.pairs import read_pairs

    return read_pairs(str(config.data.pairs), config.data)


def load_model(config: RunConfig, device: Any) -> Any:
    """Return the generator in float32; encoders are read when first used.

    Raises:
        UserError: the model is itself an adapter.
    """
    from pipelines import load_generator
    from pipelines.attention import prefer_trainable_sdpa

    prefer_trainable_sdpa(device)
    generator = load_generator(
        resolve_model(config.model),
        dtype="float32",
        device=device,
        attention=config.attention,
        resolve=resolve_model,
    )
    if generator.has_adapter:
        raise UserError(
            f"model {config.model} is an adapter on {generator.name_or_path}; train from that, or merge it first: "
            "load_generator(MODEL).save(DIR), then model: DIR"
        )
    return generator


def make_trainable(generator: Any, config: RunConfig) -> None:
    """Add the adapter, or unfreeze every weight; frozen layers are then kept in the compute precision."""
    trainer, adapter = config.trainer, config.adapter
    if adapter.kind == "lora":
        seed = derive_seed(trainer.seed, "adapter")
        generator.add_adapter(adapter.rank, alpha=adapter.alpha, target_modules=adapter.targets, seed=seed)
    else:
        generator.network.requires_grad_(True)
    round_frozen(generator.network, trainer.precision)
    if trainer.gradient_checkpointing:
        generator.enable_gradient_checkpointing()
    generator.network.train()


def open_inputs(config: RunConfig, accelerator: Any) -> tuple[Method[Any], PairTable, Any]:
    """Check the recipe, cheapest things first, and return method, table of pairs and generator; prints the counts."""
    method = build_method(config)
    check(config, method, accelerator.device)
    table = load_table(config)
    note(f"{config.data.pairs}: {table.counts}")
    check_enough(len(table), config, accelerator.num_processes)
    generator = load_model(config, accelerator.device)
    method.check(generator.process)
    return method, table, generator


def prepare(config: RunConfig, accelerator: Any) -> Prepared:
    """Return the parts of the run; prints what was read and left out."""
    method, table, generator = open_inputs(config, accelerator)
    model_id = generator.model_id  # now, since encoding may take hours in which the files can change
    pairs = encode(table, generator, config, accelerator)
    validation = Validation(config.evaluate, generator, config.trainer.seed) if config.evaluate else None
    generator.free_encoders()
    make_trainable(generator, config)
    cast = partial(autocast, config.trainer.precision, accelerator.device)
    reference = None
    if method.needs.reference:
        reference = Reference(
            generator,
            "adapter" if config.adapter.kind == "lora" else "copy",
            precision=config.trainer.precision,
            autocast=cast,
        )
    run = Run(generator, seed=config.trainer.seed, reference=reference, autocast=cast)
    feed = PairFeed(
        pairs,
        batch_size=config.trainer.batch_size,
        accumulation=config.trainer.gradient_accumulation,
        seed=config.trainer.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    return Prepared(method, run, feed, validation, data_id(table, pairs), model_id)


def check_enough(samples: int, config: RunConfig, world_size: int) -> None:
    """Refuse data that do not fill one step: better said now than after an hour of encoding.

    Raises:
        UserError: names what a step takes.
    """
    trainer = config.trainer
    per_step = trainer.batch_size * trainer.gradient_accumulation * world_size
    if samples < per_step:
        raise UserError(
            f"the data holds {samples} pairs and one step takes {per_step} (trainer.batch_size {trainer.batch_size} x "
            f"gradient_accumulation {trainer.gradient_accumulation} x {world_size} processes); lower it or give more"
        )


def encode(table: PairTable, generator: Any, config: RunConfig, accelerator: Any) -> CachedPairs:
    """Return the pairs encoded; on several ranks the first encodes and the others read what it wrote."""
    from mmalign.data.cache import build_pair_cache

    with accelerator.main_process_first(), track(len(table), "encode", unit="pairs") as job:
        return build_pair_cache(table, generator, config.data, progress=job.advance)


def data_id(table: PairTable, pairs: CachedPairs) -> str:
    """Return 32 hex digits that identify the pairs in their order: id, prompt and content of either side."""
    digest = hashlib.blake2b(digest_size=16)
    for index, (pair_id, slots) in enumerate(zip(pairs.ids, pairs.slots[:, :, 0].tolist(), strict=True)):
        parts = (pair_id, table.prompts[table.prompt_index(index)], *(pairs.latent_keys[slot] for slot in slots))
        digest.update(repr(parts).encode())
    return digest.hexdigest()


def make_plan(config: RunConfig, method: Method[Any], samples: int, generator: Any, world_size: int = 1) -> Plan:
    """Return the numbers of a run whose model is already made trainable."""
    trainer = config.trainer
    per_step = trainer.batch_size * trainer.gradient_accumulation * world_size
    left = samples % per_step
    return Plan(
        method=method.describe(),
        samples=samples,
        steps=trainer.steps,
        samples_per_step=per_step,
        images_per_step=per_step * method.images_per_sample,
        epochs=trainer.steps / (samples // per_step),
        trainable=sum(p.numel() for p in generator.trainable_parameters()),
        parameters=sum(p.numel() for p in generator.network.parameters()),
        warmup=warmup_steps(trainer.warmup, trainer.steps),
        data=f"{samples} pairs of {config.data.pairs}" + (f", {left} left over in each pass" if left else ""),
    )


def recipe(config: RunConfig, data: str, model: str, world_size: int) -> dict[str, Any]:
    """Return what must be equal for a run to be continued, flat: everything that the numbers depend on.

    `data` and `model` identify the content of the pairs and of the model that training started from. Left out is what
    only changes how a run is watched, stored or computed. How a step's samples are split into micro-batches may
    change, their number may not. With a constant schedule `steps` may change as long as the warm-up, counted in steps,
    stays as it was.
    """
    values = config.model_dump(mode="json", exclude={"output", "evaluate", "attention"})
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("pairs", "cache")}
    trainer = values["trainer"]
    for key in ("log_every", "checkpoint_every", "keep_checkpoints", "trackers", "gradient_checkpointing"):
        del trainer[key]
    per_step = trainer.pop("batch_size") * trainer.pop("gradient_accumulation") * world_size
    if trainer["schedule"] == "constant":
        # After the warm-up no learning rate depends on `steps`. A warm-up that is a fraction of them does, so what is
        # compared is the number of steps that it comes to.
        trainer["warmup, in steps"] = warmup_steps(trainer.pop("warmup"), trainer.pop("steps"))
    return {"data.content": data, "model.content": model, "trainer: samples per step": per_step, **flatten(values)}


def base_model_name(config: RunConfig) -> str:
    """Return how an adapter names its base: as given if that means the same anywhere, else as an absolute path."""
    given = Path(config.model).expanduser()
    shipped = resource_root() / given
    if not given.exists() or (shipped.exists() and shipped.samefile(given)):
        return config.model
    return str(given.resolve())


def set_aside(folder: Path) -> None:
    """Keep what an earlier run left in a folder beside that of the new one, in place of what was kept before."""
    if folder.is_dir():
        previous = folder.with_name(folder.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.replace(previous)
        note(f"what an earlier run left is kept in {previous}")
