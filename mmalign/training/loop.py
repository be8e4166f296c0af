"""The one training loop: accumulation, precision, clipping, schedule, average, checkpoints, exact resume, logging.

Whatever is drawn at random is a function of (seed, sample, epoch) or of (seed, step), so a run that was killed and
resumed logs the same losses, to the bit, as one that was not, and batch size, accumulation and ranks can trade places.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from mmalign.config.run import RunConfig
from mmalign.core.cost import COUNTERS
from mmalign.core.distributed import gather
from mmalign.core.ema import EMA
from mmalign.core.errors import TrainingDiverged, TrainingInterrupted, UserError
from mmalign.core.interrupt import StopRequest, graceful_stop
from mmalign.core.progress import Track, memory_gigabytes, note, track
from mmalign.core.seeds import derive_seed
from mmalign.training.accelerator import make_accelerator
from mmalign.training.checkpoint import (
    Checkpoint,
    abandon_later,
    check_same_recipe,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from mmalign.training.export import export, verify
from mmalign.training.optim import (
    average_gradients,
    build_optimizer,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
)
from mmalign.training.output import write_config
from mmalign.training.plan import make_plan
from mmalign.training.prepare import Prepared, prepare
from mmalign.training.recipe import recipe, set_aside
from mmalign.training.tracking import MetricBuffer, Metrics
from mmalign.training.validation import save_grid


def train_one(config: RunConfig, resume: str = "auto") -> Path:
    """Do one training, whole, and return the folder of the export; see `mmalign.training.train.train`.

    `config` is complete (`mmalign.training.recipe.complete`) and asks for neither rounds nor stages.
    """
    accelerator = make_accelerator(config)
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        parts = prepare(config, accelerator)
        trainer = Trainer(config, parts, accelerator)
        trainer.fit(resume)
        proof = export(config, parts, trainer.delivered(), trainer.facts()) if accelerator.is_main_process else None
        # Two whole models need not fit: the trained one, with its optimiser, goes before the exported one is read.
        del parts, trainer
        accelerator.free_memory()
        if proof is not None:
            verify(config, *proof, accelerator.device)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # leaves the group of processes, after which nobody can wait for anybody
        return Path(config.output)
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)  # what the same process draws later has the kernels it always has


class Trainer:
    """The loop over one run's steps."""

    def __init__(self, config: RunConfig, parts: Prepared, accelerator: Any) -> None:
        """Make the optimiser and the average over what is trainable."""
        self.config, self.settings, self.accelerator = config, config.trainer, accelerator
        self.method, self.run, self.feed, self.validation = parts.method, parts.run, parts.feed, parts.validation
        network = self.run.generator.network
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in network.named_parameters() if p.requires_grad}
        s = self.settings
        self.optimizer = accelerator.prepare(
            build_optimizer(
                self.parameters.values(), learning_rate=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay
            )
        )
        self.ema = EMA(self.parameters, s.ema) if s.ema else None
        self.best = parts.make_best(self.parameters)
        self.monitors = parts.make_monitors(config)
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.recipe = recipe(config, parts.data_id, parts.model_id, accelerator.num_processes)
        self.images_per_step = self.feed.per_step * self.method.images_per_sample
        self.cost = self.run.cost
        self.totals = self.cost.counts()
        self.round: Any = ()
        self.buffer = MetricBuffer()
        self._clock = (0, 0.0)  # step and time of the last line of metrics

    def fit(self, resume: str = "auto") -> None:
        """Run the remaining steps; on return the network holds the last step's weights."""
        settings, run = self.settings, self.run
        run.step = self._restore(resume)
        self._count()
        self.finished = run.step >= settings.steps or self._spent() or self._exhausted()
        self.output.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            write_config(self.config, self.output)
        self.metrics = Metrics(self.output, self.config, self.accelerator, run.step)
        todo = make_plan(self.config, self.method, len(self.feed.samples), run.generator, self.feed.world_size)
        note(str(todo))
        total, done = settings.steps * self.images_per_step, run.step * self.images_per_step
        with graceful_stop() as stop, track(total, "train", todo.unit, initial=done) as job:
            if run.step == 0:
                self._look()
            self._clock = (run.step, time.monotonic())
            self.cost.start()
            while not self.finished:
                self._update(run.step)
                run.step += 1
                job.advance(self.images_per_step)
                self._after_step(stop, job)

    def averaged(self) -> AbstractContextManager[None]:
        """Return the context in which the network holds what is evaluated."""
        return self.ema.applied() if self.ema else nullcontext()

    def delivered(self) -> AbstractContextManager[None]:
        """Return the context in which the network holds what is exported: the best look's weights, or the last."""
        return self.best.applied() if self.best and self.best.weights else self.averaged()

    def facts(self) -> dict[str, Any]:
        """Return what the model card says about the training as it went."""
        facts: dict[str, Any] = {"steps": self.run.step}
        facts |= {name.replace("_", " "): f"{int(self.totals[name]):,}" for name in COUNTERS if self.totals[name]}
        if self.best and self.best.weights:
            facts["exported weights"] = f"step {self.best.step}, the best by {self.best.reward} on held-out prompts"
        return facts

    def _spent(self) -> bool:
        """Whether the budget is used up."""
        if self.settings.budget is None:
            return False
        ((unit, allowed),) = self.settings.budget.model_dump(exclude_none=True).items()
        return self._count()["images_seen" if unit == "images" else unit] >= allowed

    def _count(self) -> dict[str, float]:
        """Return what all ranks have used: counts added up, the seconds of the slowest."""
        self.totals = self.cost.counts()
        if self.accelerator.num_processes > 1:
            everyone = gather(self.totals)
            self.totals = {name: sum(one[name] for one in everyone) for name in COUNTERS}
            self.totals["seconds"] = max(one["seconds"] for one in everyone)
        return self.totals

    def _update(self, step: int) -> None:
        """One optimiser step."""
        settings, accelerator = self.settings, self.accelerator
        # For what has no sample to be seeded by, such as dropout; rank by rank, since each sees other samples.
        torch.manual_seed(derive_seed(settings.seed, "step", step, accelerator.process_index))
        factor = learning_rate_factor(step, settings.steps, settings.warmup, settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        for batch in self._batches(step):
            metrics = self.method.learn(self.run, batch, self._backward)
            self.buffer.add(step + 1, metrics)
        parameters = list(self.parameters.values())
        average_gradients(parameters, accelerator.num_processes)
        norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        self.buffer.add(step + 1, {"grad_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()

    def _batches(self, step: int) -> Iterable[Any]:
        """Return what this step learns from: what is dealt, or the round of samples that the method has collected."""
        number, update = divmod(step, self.method.updates_per_round)
        if update == 0:
            self.round = ()  # two rounds need not fit into memory together
            collected = self.method.collect(self.run, self.feed.micro_batches(number))
            self.round = collected if self.method.updates_per_round == 1 else list(collected)
        return self.round

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss / self.settings.gradient_accumulation)

    def _after_step(self, stop: StopRequest, job: Track) -> None:
        """Log, look and save as far as it is time to."""
        step, settings, updates = self.run.step, self.settings, self.method.updates_per_round
        # In the middle of a round no run could go on: its samples are the policy's of before.
        between = step % updates == 0
        stopping = between and self._agree_to_stop(stop)
        every = settings.checkpoint_every
        saving = stopping or (between and step // every > (step - updates) // every)
        looking = self.validation is not None and step % self.validation.config.every == 0
        self.finished = step >= settings.steps or (between and (self._spent() or self._exhausted()))
        # Reading the metrics finds what is not finite: always before anything is looked at or saved.
        if self.finished or saving or looking or step % settings.log_every == 0:
            job.advance(0, **self._log())
            self.finished |= between and self._alarmed()
        if self.validation is not None and (looking or self.finished):
            self._look()
            self.finished |= between and (self._alarmed() or self._exhausted())
        if saving or self.finished:
            self._save()
        if looking or saving:
            self._clock = (step, time.monotonic())
        if stopping and not self.finished:
            raise TrainingInterrupted(f"stopped after step {step}; run the same command again to go on from there")

    def _exhausted(self) -> bool:
        """Whether the looks call for an early stop."""
        return self.best is not None and self.best.exhausted

    def _alarmed(self) -> bool:
        """Say what the monitors have found, and return whether it ends the run."""
        if self.monitors is None:
            return False
        new = self.monitors.alarms() if self.accelerator.is_main_process else []
        for alarm in new:
            note(f"warning: {alarm.sentence}")
        stop = [any(alarm.stop for alarm in new)]
        if self.config.monitors.action == "stop":
            broadcast_object_list(stop)
        if stop[0]:
            note("monitors: stopping (monitors.action is stop); the same command again goes on all the same")
        return stop[0]

    def _agree_to_stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.requested
        if self.run.step % self.settings.log_every:  # asking all ranks costs a message
            return False
        wish = torch.tensor(float(stop.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum") > 0)

    def _log(self) -> dict[str, float]:
        """Write one line of metrics, the means since the last line, and return what the progress bar shows.

        Raises:
            TrainingDiverged: a loss or a gradient norm was not finite.
        """
        step = self.run.step
        rows = self.buffer.read(self.accelerator.device)
        self._check_finite(rows)
        columns: dict[str, list[float]] = {}
        for _, name, value in rows:
            columns.setdefault(name, []).append(value)
        values = self._mean_over_ranks({name: math.fsum(column) / len(column) for name, column in columns.items()})
        since, then = self._clock
        now = time.monotonic()
        values |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "epoch": step / self.method.updates_per_round / self.feed.steps_per_epoch,
            "images_per_second": (step - since) * self.images_per_step / max(now - then, 1e-9),
            "memory_gb": memory_gigabytes()[0],
            **self._count(),
        }
        if self.monitors is not None:
            if self.run.shown is not None:
                values |= self.monitors.pictures(step, *self.run.shown)
                self.run.shown = None  # each picture once, and its memory back
            self.monitors.metrics(step, {"kl": values.get("distance", math.nan), **values})
        self.metrics.log(step, values)
        self._clock = (step, now)
        return {name: values[name] for name in ("loss", "accuracy", "reward") if name in values}

    def _check_finite(self, rows: list[tuple[int, str, float]]) -> None:
        # With fp16 an infinite gradient is how the scaler finds its scale; it leaves out such a step by itself.
        watched = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
        for step, name, value in rows:
            if name in watched and not math.isfinite(value):
                saved = list_checkpoints(self.checkpoints)
                last = f"the last sound checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
                raise TrainingDiverged(
                    f"the {name.replace('_', ' ')} became {value} at step {step}; nothing was saved after it, {last}. "
                    "Lower trainer.learning_rate, or use trainer.precision bf16 or fp32"
                )

    def _mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return values
        local = torch.tensor(list(values.values()), device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(local, "mean").tolist(), strict=True))

    def _look(self) -> None:
        """Evaluate on the fixed prompts; on the first rank, while the others wait."""
        if self.validation is None:
            return
        step, scores, totals = self.run.step, [dict[str, float]()], self._count()
        with self.cost.paused(), self.averaged():
            if self.accelerator.is_main_process:
                scores[0], spreads, picture = self.validation.look(self.run)
                if self.monitors is not None:
                    self.monitors.look(step, scores[0], spreads)
                if picture is not None:
                    save_grid(picture, self.output, step)
                    self.metrics.log_image(step, "evaluation", picture)
                self.metrics.log(step, scores[0] | totals)
                note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores[0].items()))
            self.accelerator.wait_for_everyone()
            if self.best:
                broadcast_object_list(scores)
                self.best.look(step, scores[0])

    def _save(self) -> None:
        self._count()
        with self.cost.paused():
            if self.accelerator.is_main_process:
                save_checkpoint(self.checkpoints, self._checkpoint(), self.settings.keep_checkpoints)
            self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> Checkpoint:
        tensors = {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": optimizer_tensors(self.optimizer, list(self.parameters)),
        }
        values: dict[str, Any] = {"cost": self.totals, "method": self.method.state_dict()}
        if self.monitors is not None:
            values["monitors"] = self.monitors.state_dict()
        if self.ema:
            tensors["ema"] = self.ema.shadow
            values["ema_updates"] = self.ema.updates
        if self.best:
            tensors |= {"best": self.best.weights} if self.best.weights else {}
            values["best"] = self.best.state()
        if self.accelerator.scaler is not None:
            values["scaler"] = self.accelerator.scaler.state_dict()
        return Checkpoint(self.run.step, tensors, self.recipe, values)

    def _restore(self, resume: str) -> int:
        """Load the checkpoint to go on from, if there is one, and return its step.

        Raises:
            UserError: it is damaged, of another recipe, or beyond the last step asked for.
        """
        path = self._choose_checkpoint(resume)
        if path is None:
            return 0
        saved = load_checkpoint(path)
        check_same_recipe(saved.recipe, self.recipe, path)
        if saved.step > self.settings.steps:
            raise UserError(f"{path} is beyond trainer.steps {self.settings.steps}; raise it, or use --resume never")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.tensors["weights"][name])
        load_optimizer_tensors(self.optimizer, list(self.parameters), saved.tensors["optimizer"])
        if self.ema:
            self.ema.load(saved.tensors["ema"], saved.values["ema_updates"])
        if self.best:
            self.best.load(saved.values.get("best", {}), saved.tensors.get("best", {}))
        self.cost.load(saved.values["cost"], self.accelerator.process_index, self.accelerator.num_processes)
        self.method.load_state_dict(saved.values["method"])
        if self.monitors is not None:
            self.monitors.load_state_dict(saved.values["monitors"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.values["scaler"])
        if self.accelerator.is_main_process:
            abandon_later(self.checkpoints, saved.step)
        note(f"going on from {path}")
        return saved.step

    def _choose_checkpoint(self, resume: str) -> Path | None:
        if resume == "never":
            if self.accelerator.is_main_process:
                set_aside(self.checkpoints)
            self.accelerator.wait_for_everyone()
            return None
        if resume == "auto":
            found = list_checkpoints(self.checkpoints)
            return found[-1] if found else None
        return Path(resume)
