"""Train a latent reward: noise both images of a pair to one level, each with its own noise; predict the preferred one.

Source: Zhang et al. 2025, arXiv:2502.01051. Every draw is a function of (seed, pair, epoch), so a run that was stopped
and resumed gives the numbers of one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.config.yaml import flatten
from mmalign.core import distributed
from mmalign.core.errors import UserError
from mmalign.core.files import check_output, write_atomically
from mmalign.core.precision import autocast, check_precision
from mmalign.core.progress import note, track
from mmalign.core.resources import resolve_model
from mmalign.core.seeds import derive_seed
from mmalign.data.batches import ComparisonBatch
from mmalign.data.encoded.cache import CachedSides, encode_sides, pair_sides
from mmalign.data.pairs import read_pairs
from mmalign.data.sampler import BatchSampler
from mmalign.losses import latent_reward
from mmalign.methods.run import Run
from mmalign.training.accelerator import make_accelerator
from mmalign.training.latent_reward.accuracy import LevelAccuracy, measure, table_of
from mmalign.training.latent_reward.comparisons import Comparisons, split
from mmalign.training.latent_reward.config import LatentRewardConfig
from mmalign.training.learner import Learner
from mmalign.training.loop import Loop
from mmalign.training.optim import build_optimizer
from mmalign.training.output import CHECKPOINTS
from mmalign.training.recipe import data_id
from pipelines import Generator, load_generator
from pipelines.load import family_of, process_of
from rewards.backbones.latent_files import LatentParts
from rewards.backbones.latent_network import MAX_LOGIT_SCALE, LatentNetwork

ACCURACY = "accuracy.json"


def train_reward(config: LatentRewardConfig, *, resume: str = "auto") -> Path:
    """Train as the configuration says and return the directory of the reward (`config.output`).

    `resume`: "auto" resumes from the last checkpoint in the output if there is one, "never" starts again.

    Raises:
        UserError: the configuration cannot work, or differs from that of the checkpoint.
        TrainingDiverged: the loss is not finite. DiskFull: no room to save.
        TrainingInterrupted: Ctrl-C; the run can be resumed from the checkpoint it saved.
    """
    output = Path(config.output)
    check_output(output, "output")
    accelerator = make_accelerator(config)
    check_precision(config.trainer.precision, accelerator.device)
    if config.data.on_bad == "skip":
        raise UserError("data.on_bad: skip is for `mmalign train`; remove it, and take out the pairs that it names")
    table = read_pairs(str(config.data.pairs), config.data)
    note(f"{config.data.pairs}: {table.counts}")
    generator = _load_generator(config, accelerator.device)
    recipe_of = _recipe(config, generator.model_id)
    with accelerator.main_process_first(), track(len(table), "encode", unit="pairs") as job:
        sides = CachedSides(**encode_sides(table, pair_sides, generator, config.data, progress=job.advance))
    learned, held_out = split(table, sides, config.held_out, config.trainer.seed)
    run = Run(generator, seed=config.trainer.seed)
    recipe = {"data.content": data_id(table, sides), **recipe_of}
    learner = RewardLearner(config, make_parts(generator, config), run, learned, accelerator, recipe)
    Loop(learner, config).run(resume)
    if distributed.is_main():
        note(f"measuring on {len(held_out)} held-out pairs")
        accuracies = learner.measure(held_out)
        learner.save(accuracies, len(held_out))
        print(table_of(accuracies))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def make_parts(generator: Generator, config: LatentRewardConfig) -> LatentParts:
    """Take a generator apart: its network is cut in half in place, and everything in the result is trainable."""
    suffixes = [name.removeprefix("text_encoder") for name in generator.text_names if name.startswith("text_encoder")]
    torch.manual_seed(derive_seed(config.trainer.seed, "projections"))
    network = LatentNetwork(
        generator.network,
        [generator.encoder(f"text_encoder{suffix}") for suffix in suffixes],
        image_size=config.data.resolution or generator.image_size,
        guidance=config.guidance,
        features=config.features,
    )
    network.to(generator.device).requires_grad_(True).train()
    if config.trainer.gradient_checkpointing:
        network.unet.enable_gradient_checkpointing()
    tokenizers = [generator.encoder(f"tokenizer{suffix}") for suffix in suffixes]
    record = {"model": generator.name_or_path, "pairs": str(config.data.pairs)}
    return LatentParts(network, generator.encoder("vae"), generator.scheduler, tokenizers, record)


def level_grid(levels: int, num_train_timesteps: int) -> list[int]:
    """Return evenly spaced timesteps from 1 to the last at most: 1, 51, ..., 951 for 20 of 1000."""
    return [min(1 + index * num_train_timesteps // levels, num_train_timesteps - 1) for index in range(levels)]


class RewardLearner(Learner):
    """The learner of a latent reward: its whole network is trained, at a random level of the grid for each pair."""

    run: Run

    def __init__(
        self,
        config: LatentRewardConfig,
        parts: LatentParts,
        run: Run,
        learned: Comparisons,
        accelerator: Any,
        recipe: dict[str, Any],
    ) -> None:
        """Make the optimiser over everything in the network.

        Raises:
            UserError: the pairs do not fill one step.
        """
        self.parts, self.network, self.output = parts, parts.network, Path(config.output)
        self.grid = level_grid(config.levels, run.process.num_train_timesteps)
        s, world_size = config.trainer, distributed.world_size()
        per_step = s.batch_size * s.gradient_accumulation * world_size
        if len(learned) < per_step:
            raise UserError(
                f"{len(learned)} pairs to learn from do not fill one step of {per_step} (trainer.batch_size x "
                "gradient_accumulation x processes); lower it or give more"
            )
        run.cost.watch(parts.network)
        parameters = dict(parts.network.named_parameters())
        super().__init__(
            parameters,
            build_optimizer(parameters.values(), learning_rate=s.learning_rate, weight_decay=s.weight_decay),
            run=run,
            sampler=BatchSampler(
                learned,
                batch_size=s.batch_size,
                accumulation=s.gradient_accumulation,
                seed=s.seed,
                rank=distributed.rank(),
                world_size=world_size,
                device=accelerator.device,
            ),
            settings=s,
            accelerator=accelerator,
            recipe=recipe,
            samples_per_step=2 * per_step,
            checkpoints=self.output / CHECKPOINTS,
        )

    def batches(self, step: int) -> Iterable[ComparisonBatch]:
        """Return the comparisons of a step."""
        return self.sampler.micro_batches(step)

    def learn(self, batch: ComparisonBatch) -> Mapping[str, Tensor | float]:
        """Add the gradient of a weighted batch of comparisons."""
        drawn = [self.grid[seed % len(self.grid)] for seed in self.run.seeds(batch.ids, batch.epoch, "level")]
        chosen, rejected = self.scores(batch, torch.tensor(drawn, device=self.accelerator.device), "noise")
        loss = (batch.weights * latent_reward(chosen, rejected, batch.preference)).mean()
        self.backward(loss)
        return {"loss": loss, "accuracy": (chosen > rejected).float().mean()}

    def metrics(self, step: int) -> dict[str, float]:
        """Return the means since the last call, and the logit scale as it is now."""
        return {**super().metrics(step), "logit_scale": float(self.network.logit_scale.detach())}

    @torch.no_grad()
    def after_update(self) -> None:
        """Keep the logit scale within its bounds."""
        self.network.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def scores(
        self, batch: ComparisonBatch, t: Int[Tensor, " batch"], purpose: str
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return the scores of chosen and rejected at one level a pair, each side with noise of its own."""
        noisy = [
            self.run.process.add_noise(
                side, self.run.noise_like(side, batch.ids, batch.epoch, f"{purpose} {index}"), t
            )
            for index, side in enumerate((batch.chosen, batch.rejected))
        ]
        device = self.accelerator.device
        with autocast(self.settings.precision, device):
            texts = self.network.encode(self.parts.tokens([*batch.prompts, ""]))
            rows = torch.arange(len(batch), device=device).repeat(2)
            empty = texts.rows(torch.tensor([len(batch)], device=device))
            both = self.network(torch.cat(noisy), t.repeat(2), texts.rows(rows), empty)
        chosen, rejected = both.float().chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def measure(self, pairs: Comparisons) -> list[LevelAccuracy]:
        """Return the accuracy on pairs at every level of the grid."""
        self.network.eval()
        return measure(
            pairs, self.grid, self.scores, self.settings.batch_size, self.settings.seed, self.accelerator.device
        )

    def save(self, accuracies: list[LevelAccuracy], pairs: int) -> None:
        """Write the reward and its measured accuracy."""
        mean = math.fsum(one.accuracy for one in accuracies) / len(accuracies)
        found = {"pairs": pairs, "accuracy": mean, "levels": [one._asdict() for one in accuracies]}
        self.parts.record["held_out_accuracy"] = mean
        self.parts.save(self.output)
        write_atomically(self.output / ACCURACY, json.dumps(found, indent=2) + "\n")


def _load_generator(config: LatentRewardConfig, device: torch.device) -> Generator:
    path = resolve_model(config.model)
    refusal = UserError(
        f"model {config.model} is a flow model; a latent reward is built from the UNet of an SD or SDXL"
    )
    process, family = process_of(path, resolve_model), family_of(path, resolve_model)
    if family.modality == "video":
        raise UserError(f"model {config.model} makes videos; a latent reward is built from the UNet of an SD or SDXL")
    if family.is_flow or (process is not None and process.prediction == "flow"):
        raise refusal
    generator = load_generator(path, device=device, resolve=resolve_model)
    if generator.process.prediction == "flow":  # a single file
        raise refusal
    if generator.has_adapter:
        raise UserError(f"model {config.model} is an adapter on {generator.name_or_path}; build the reward from that")
    return generator


def _recipe(config: LatentRewardConfig, model: str) -> dict[str, Any]:
    """Return the values that must be equal to resume a training, flat."""
    values = config.model_dump(mode="json", exclude={"output", "model"})
    values["data"] = {key: value for key, value in values["data"].items() if key not in ("pairs", "cache")}
    for key in ("log_every", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing"):
        del values["trainer"][key]
    for key in ("trackers", "tracker_project", "tracker_run"):
        del values["trainer"][key]
    return {"model.content": model, **flatten(values)}
