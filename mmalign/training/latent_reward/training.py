"""Train a latent reward: noise both images of a pair to one level, each with its own noise; tell which is better.

Source: Zhang et al. 2025, arXiv:2502.01051. Every draw is a function of (seed, pair, epoch), so a run that was stopped
and goes on gives the numbers of one that was not. One process.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.config.run import dump_config
from mmalign.config.yaml import flatten
from mmalign.core.errors import TrainingDiverged, TrainingInterrupted, UserError
from mmalign.core.files import check_output, write_atomically
from mmalign.core.interrupt import graceful_stop
from mmalign.core.precision import autocast, check_precision
from mmalign.core.progress import Track, note, track
from mmalign.core.resources import resolve_model
from mmalign.core.seeds import derive_seed
from mmalign.data.batches import ComparisonBatch
from mmalign.data.encoded.cache import CachedSides, encode_sides, pair_sides
from mmalign.data.feed import Feed
from mmalign.data.pairs import read_pairs
from mmalign.losses import latent_reward
from mmalign.methods.run import Run
from mmalign.training.checkpoint import (
    Checkpoint,
    check_same_recipe,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from mmalign.training.latent_reward.accuracy import LevelAccuracy, measure, table_of
from mmalign.training.latent_reward.comparisons import Comparisons, split
from mmalign.training.latent_reward.config import LatentRewardConfig
from mmalign.training.optim import build_optimizer, learning_rate_factor, load_optimizer_tensors, optimizer_tensors
from mmalign.training.recipe import data_id, set_aside
from rewards.backbones.latent_files import LatentParts
from rewards.backbones.latent_network import MAX_LOGIT_SCALE, LatentNetwork

ACCURACY, METRICS, CONFIG = "accuracy.json", "metrics.jsonl", "config.yaml"


def train_reward(config: LatentRewardConfig, *, resume: str = "auto") -> Path:
    """Train as the configuration says and return the directory of the reward (`config.output`).

    `resume`: "auto" goes on from the last checkpoint in the output if there is one, "never" starts again.

    Raises:
        UserError: the configuration cannot work, or differs from that of the checkpoint.
        TrainingDiverged: the loss is not finite. DiskFull: no room to save.
        TrainingInterrupted: Ctrl-C; the run goes on from the checkpoint it saved.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(config.output)
    check_output(output, "output")
    check_precision(config.trainer.precision, device)
    table = read_pairs(str(config.data.pairs), config.data)
    note(f"{config.data.pairs}: {table.counts}")
    generator = _load_generator(config, device)
    model_id = generator.model_id
    with track(len(table), "encode", unit="pairs") as job:
        sides = CachedSides(**encode_sides(table, pair_sides, generator, config.data, progress=job.advance))
    learned, held_out = split(table, sides, config.held_out, config.trainer.seed)
    trainer = RewardTrainer(config, make_parts(generator, config), Run(generator, seed=config.trainer.seed), learned)
    trainer.recipe = _recipe(config, data_id(table, sides), model_id)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / CONFIG, dump_config(config))
    trainer.fit(resume)
    note(f"measuring on {len(held_out)} held-out pairs")
    accuracies = trainer.measure(held_out)
    trainer.save(accuracies, len(held_out))
    print(table_of(accuracies))
    return output


def make_parts(generator: Any, config: LatentRewardConfig) -> LatentParts:
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


class RewardTrainer:
    """The loop over one training's steps."""

    recipe: dict[str, Any]

    def __init__(self, config: LatentRewardConfig, parts: LatentParts, run: Run, learned: Comparisons) -> None:
        """Make the optimiser over everything in the network."""
        self.config, self.settings, self.parts, self.run = config, config.trainer, parts, run
        self.network = parts.network
        self.device = self.network.logit_scale.device
        self.output = Path(config.output)
        self.grid = level_grid(config.levels, run.process.num_train_timesteps)
        s = self.settings
        if len(learned) < s.batch_size * s.gradient_accumulation:
            raise UserError(
                f"{len(learned)} pairs to learn from do not fill one step of {s.batch_size * s.gradient_accumulation} "
                "(trainer.batch_size x gradient_accumulation); lower it or give more"
            )
        self.feed = Feed(
            learned, batch_size=s.batch_size, accumulation=s.gradient_accumulation, seed=s.seed, device=self.device
        )
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = build_optimizer(
            self.parameters.values(), learning_rate=s.learning_rate, weight_decay=s.weight_decay
        )
        self._lines: list[tuple[float, float]] = []
        self._since = time.monotonic()

    def fit(self, resume: str) -> None:
        """Run the remaining steps."""
        s, step = self.settings, self._restore(resume)
        per_step = self.feed.per_step
        with graceful_stop() as stop, track(s.steps * per_step, "train", "pairs", initial=step * per_step) as job:
            while step < s.steps:
                self._update(step)
                step += 1
                job.advance(per_step)
                if step % s.log_every == 0 or step == s.steps:
                    self._log(step, job)
                if step % s.checkpoint_every == 0 or stop.requested or step == s.steps:
                    self._checkpoint(step)
                if stop.requested and step < s.steps:
                    raise TrainingInterrupted(f"stopped after step {step}; run the same command again to go on")

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
        with autocast(self.settings.precision, self.device):
            texts = self.network.encode(self.parts.tokens([*batch.prompts, ""]))
            rows = torch.arange(len(batch), device=self.device).repeat(2)
            empty = texts.rows(torch.tensor([len(batch)], device=self.device))
            both = self.network(torch.cat(noisy), t.repeat(2), texts.rows(rows), empty)
        chosen, rejected = both.float().chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def measure(self, pairs: Comparisons) -> list[LevelAccuracy]:
        """Return the accuracy on pairs at every level of the grid."""
        self.network.eval()
        return measure(pairs, self.grid, self.scores, self.settings.batch_size, self.settings.seed, self.device)

    def save(self, accuracies: list[LevelAccuracy], pairs: int) -> None:
        """Write the reward, and beside it what was measured."""
        mean = math.fsum(one.accuracy for one in accuracies) / len(accuracies)
        found = {"pairs": pairs, "accuracy": mean, "levels": [one._asdict() for one in accuracies]}
        self.parts.record["held_out_accuracy"] = mean
        self.parts.save(self.output)
        write_atomically(self.output / ACCURACY, json.dumps(found, indent=2) + "\n")

    def _update(self, step: int) -> None:
        s = self.settings
        torch.manual_seed(derive_seed(s.seed, "step", step))
        factor = learning_rate_factor(step, s.steps, s.warmup, s.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * factor
        for batch in self.feed.micro_batches(step):
            drawn = [self.grid[seed % len(self.grid)] for seed in self.run.seeds(batch.ids, batch.epoch, "level")]
            chosen, rejected = self.scores(batch, torch.tensor(drawn, device=self.device), "noise")
            loss = (batch.weights * latent_reward(chosen, rejected, batch.preference)).mean()
            if not bool(loss.isfinite()):
                raise TrainingDiverged(
                    f"the loss of step {step + 1} is {float(loss.detach())}; lower trainer.learning_rate, or use "
                    "trainer.precision fp32, and run the same command again: it goes on from the last checkpoint"
                )
            (loss / s.gradient_accumulation).backward()
            self._lines.append((float(loss.detach()), float((chosen > rejected).float().mean())))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), s.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.network.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def _log(self, step: int, job: Track) -> None:
        losses, right = (math.fsum(column) / len(column) for column in zip(*self._lines, strict=True))
        now = time.monotonic()
        line = {
            "step": step,
            "loss": losses,
            "accuracy": right,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "logit_scale": float(self.network.logit_scale.detach()),
            "seconds": now - self._since,
        }
        self._lines, self._since = [], now
        with (self.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        job.advance(0, loss=losses, accuracy=right)

    def _checkpoint(self, step: int) -> None:
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        moments = optimizer_tensors(self.optimizer, list(self.parameters))
        saved = Checkpoint(step, {"weights": weights, "optimizer": moments}, self.recipe)
        save_checkpoint(self.output / "checkpoints", saved, self.settings.keep_checkpoints)

    def _restore(self, resume: str) -> int:
        """Load the last checkpoint, if there is one and it is wanted, and return its step."""
        folder = self.output / "checkpoints"
        found = list_checkpoints(folder) if resume == "auto" else []
        if not found:
            set_aside(folder)
            (self.output / METRICS).unlink(missing_ok=True)
            return 0
        saved = load_checkpoint(found[-1])
        check_same_recipe(saved.recipe, self.recipe, found[-1])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.tensors["weights"][name])
        load_optimizer_tensors(self.optimizer, list(self.parameters), saved.tensors["optimizer"])
        if (self.output / METRICS).is_file():
            lines = (self.output / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= saved.step]
            write_atomically(self.output / METRICS, "".join(kept))
        note(f"going on from {found[-1]}")
        return saved.step


def _load_generator(config: LatentRewardConfig, device: torch.device) -> Any:
    from pipelines import load_generator

    generator = load_generator(resolve_model(config.model), device=device, resolve=resolve_model)
    if generator.has_adapter:
        raise UserError(f"model {config.model} is an adapter on {generator.name_or_path}; a reward is made of that")
    return generator


def _recipe(config: LatentRewardConfig, data: str, model: str) -> dict[str, Any]:
    """Return what must be equal for a training to be continued, flat."""
    values = config.model_dump(mode="json", exclude={"output", "model"})
    values["data"] = {key: value for key, value in values["data"].items() if key not in ("pairs", "cache")}
    for key in ("log_every", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing"):
        del values["trainer"][key]
    return {"data.content": data, "model.content": model, **flatten(values)}
