"""Learn from recorded sampling steps: sample with the policy, score, then learn from the log-probs of the steps.

An objective that is a function of the log-probabilities of the sampling steps needs no graph of the whole trajectory.
Its derivative with respect to each log-probability is taken first, on numbers alone; then every sampling step is
computed again, one at a time, with its own graph, and weighted by that derivative. The gradient is exactly that of
the objective, and only the recorded latents need memory that grows with the number of steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.core.errors import TrainingDiverged
from mmalign.core.progress import note
from mmalign.data.batches import PromptBatch
from mmalign.losses import denoising_error, gaussian_kl
from mmalign.methods.base import LossOutput
from mmalign.methods.group_rewards import reward_metrics
from mmalign.methods.mini_batches import cut_round
from mmalign.methods.run import WATCHED, Run
from mmalign.methods.sampling import RoundConfig, RoundMethod
from mmalign.scoring.live import Scores
from pipelines import Kernel, Schedule, sample
from pipelines.guidance import guided_predictor
from pipelines.sampling import Trajectory, replay_step

HALF_TOLERANCE = 1e-3
RATIO_FAULT = (
    "before the first update of a round the importance ratio must be 1, and it is off by {worst:.2g} (allowed "
    "{tolerance:g}): sampling and learning do not compute the same. Usual causes: dropout in the network; kernels "
    "that round otherwise with a gradient or in batches of another size (trainer.precision fp32 shows it); an "
    "attention kernel that is not deterministic; a network that is compiled or quantised for sampling alone; "
    "guidance, padding of the text or timesteps that differ between the two"
)


class RatioError(TrainingDiverged):
    """Sampling and learning compute different log-probabilities, so importance ratios are not meaningful."""


class SamplingPlan(NamedTuple):
    """How the samples of a micro-batch are drawn: arguments of `sample`, and what is learned from.

    `learned` counts the recorded steps.
    """

    kernel: Kernel
    steps: int | Schedule
    record: bool | range
    learned: range


class Replay(NamedTuple):
    """A recorded step of some samples under the present network."""

    mean: Float[Tensor, "rows *latent"]
    std: Float[Tensor, " rows"]
    log_prob: Float[Tensor, " rows"]
    predicted: Float[Tensor, "rows *latent"]


@dataclass
class Rollout:
    """Samples of one micro-batch, ordered by prompt, with their recorded steps; log-probs are means over dimensions.

    `old_means` and `old_log_probs` are the policy's at the start of the round, `log_probs` and `means` those of the
    current policy (set before `loss` is called; the loss is differentiated by the former), `reference_log_probs` those
    of the reference model.
    """

    samples: PromptBatch
    trajectory: Trajectory
    rewards: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]]
    old_means: Float[Tensor, "steps batch *latent"]
    old_log_probs: Float[Tensor, "steps batch"]
    log_probs: Float[Tensor, "steps batch"]
    drawn_at: int
    learned: range
    """The part of the sampling whose random steps are learned from."""
    means: Float[Tensor, "steps batch *latent"] | None = None
    reference_log_probs: Float[Tensor, "steps batch"] | None = None
    reference_means: Float[Tensor, "steps batch *latent"] | None = None
    reference_outputs: Float[Tensor, "steps batch *latent"] | None = None
    """The reference's guided predictions, where `distance_weight` needs them."""
    novelty: Float[Tensor, " batch"] | None = None
    advantages: Float[Tensor, " batch"] | None = None
    wanted: Bool[Tensor, "steps batch"] | None = None
    """The log-probs that the present update uses; all if not set."""
    share: float = 1.0
    """Weight of the loss; the micro-batches of a mini-batch add up to its mean."""
    first_pass: bool = False
    """Whether this is part of a mini-batch of the first pass over a round, in which rewards are logged."""

    @property
    def stds(self) -> Float[Tensor, "steps batch"]:
        """The standard deviation of each recorded step; 0 where the sampler is deterministic."""
        assert self.trajectory.stds is not None
        return self.trajectory.stds

    def select(self, rows: Int[Tensor, " rows"], share: float, first_pass: bool) -> Rollout:
        """Return some of the samples, by their numbers."""

        def of_steps(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, rows]

        return replace(
            self,
            samples=self.samples.select(rows),
            trajectory=self.trajectory.select(rows),
            rewards=self.rewards[rows],
            parts={name: scores[rows] for name, scores in self.parts.items()},
            old_means=self.old_means[:, rows],
            old_log_probs=self.old_log_probs[:, rows],
            log_probs=self.log_probs[:, rows],
            means=of_steps(self.means),
            reference_log_probs=of_steps(self.reference_log_probs),
            reference_means=of_steps(self.reference_means),
            reference_outputs=of_steps(self.reference_outputs),
            novelty=None,  # it is in the advantages
            advantages=None if self.advantages is None else self.advantages[rows],
            wanted=of_steps(self.wanted),
            share=share,
            first_pass=first_pass,
        )

    def learned_steps(self) -> list[int]:
        """Return the steps that are learned from: those of the chosen part that have a density."""
        return [index for index in (self.stds > 0).all(1).nonzero().flatten().tolist() if index in self.learned]


RolloutT = TypeVar("RolloutT", bound=RoundConfig)


class RolloutMethod(RoundMethod[RolloutT]):
    """Base of methods that learn from the log-probabilities of their own samples; `loss` takes a `Rollout`."""

    compares_images: ClassVar[bool] = True
    """Whether the loss compares the images of a prompt, so that a mini-batch takes all of them or none."""
    whole_reference: ClassVar[bool] = False
    """Whether the reference's log-probs are wanted at every step; otherwise one step a round is enough to watch by."""
    whole_first: bool = True
    """Whether the first update of a round computes all samples of a step, in the batches in which they were drawn."""
    ratio_tolerance: ClassVar[float] = 1e-4
    """How far the ratio may be from 1 before the first update of a round."""
    _noted_rounding: bool = False
    kl_weight: float = 0.0
    """Adds this many times the KL divergence to the reference, a mean over learned sampling steps and dimensions."""
    distance_weight: float = 0.0
    """Adds this many times the mean squared difference of the guided predictions of policy and reference."""
    constant_negative: bool = False
    """Whether no gradient flows through the prediction without the prompt."""

    @abstractmethod
    def plan(self, run: Run) -> SamplingPlan:
        """Return how the samples of the present round are drawn."""

    @abstractmethod
    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the objective as a function of `batch.log_probs`; terms of the network itself belong to `learn`."""

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[Rollout]:
        """Sample and score the images of one round with the current policy."""
        return [self._draw(run, batch.repeat(self.config.images_per_prompt)) for batch in batches]

    def split(self, run: Run, collected: Iterable[Rollout]) -> Sequence[Sequence[Rollout]]:
        """Pass over the round `updates_per_round` times, each time shuffled and cut into `mini_batches`."""
        c = self.config
        unit = c.images_per_prompt if self.compares_images else 1
        source = partial(run.random, "mini-batches", run.step)
        return cut_round(list(collected), c.updates_per_round, c.mini_batches, unit=unit, source=source)

    def sampler(self, run: Run) -> AbstractContextManager[None]:
        """Return the context for sampling; by default the policy itself samples."""
        return nullcontext()

    def scores(self, run: Run, images: Tensor, samples: PromptBatch) -> Scores:
        """Return what the samples score; by default the rewards of each."""
        return run.score(images, samples.prompts)

    def initial_noise(self, run: Run, seeds: Sequence[int]) -> Float[Tensor, "batch *latent"] | None:
        """Return the noise that a micro-batch's samples start from; by default each has that of its seed."""
        return None

    def log_prob(self, batch: Rollout, index: int, step: Replay, rows: Int[Tensor, " rows"]) -> Tensor:
        """Return what the objective is a function of, at a recorded step of some samples; by default the log-prob."""
        return step.log_prob

    def kl_units(self, run: Run, batch: Rollout) -> list[float]:
        """Return a factor of the KL to the reference for each recorded step; by default 1."""
        return [1.0] * len(batch.stds)

    @torch.no_grad()
    def _draw(self, run: Run, samples: PromptBatch) -> Rollout:
        plan, seeds = self.plan(run), run.seeds(samples.ids, samples.epoch)
        with self.sampler(run):
            trajectory = sample(
                run.generator,
                samples.cond,
                steps=plan.steps,
                guidance=self.config.guidance,
                kernel=plan.kernel,
                seeds=seeds,
                latents=self.initial_noise(run, seeds),
                record=plan.record,
                autocast=run.autocast,
            )
        images = run.decode(trajectory.latents)
        run.show(images, samples.prompts)
        scores = self.scores(run, images, samples)
        assert trajectory.log_probs is not None and trajectory.means is not None
        rollout = Rollout(
            samples=samples,
            trajectory=trajectory,
            rewards=scores.total,
            parts=scores.parts,
            novelty=scores.novelty,
            old_means=trajectory.means,
            old_log_probs=trajectory.log_probs,
            log_probs=trajectory.log_probs,
            drawn_at=run.step,
            learned=plan.learned,
        )
        if self.whole_reference or self.kl_weight or self.distance_weight:
            outputs = torch.zeros_like(trajectory.means) if self.distance_weight else None
            with run.reference.active():
                rollout.reference_means, rollout.reference_log_probs = self.replay_all(run, rollout, outputs)
            rollout.reference_outputs = outputs
        return rollout

    def learn(self, run: Run, batch: Rollout, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Differentiate the objective by the log-probs, then recompute the sampling steps one by one with a graph."""
        fresh, held = batch.drawn_at == run.step, bool(self.kl_weight or self.distance_weight)
        found = (batch.old_means, batch.old_log_probs) if fresh else self.replay_all(run, batch)
        batch.means, batch.log_probs = found[0], found[1].clone().requires_grad_()
        output = self.loss(run, batch)
        batch.means = None  # as large as the samples
        (weights,) = torch.autograd.grad(output.loss, batch.log_probs)
        learned = batch.learned_steps()
        everything = torch.arange(weights.shape[1], device=weights.device)
        # At least one step is computed, so that there is always a gradient, even if it is zero.
        for index in [i for i in learned if held or bool(weights[i].any())] or learned[:1]:
            # The first update takes all rows, in the batches in which they were sampled: the ratio is exactly 1.
            needed = everything if (fresh and self.whole_first) or held else weights[index].nonzero().flatten()
            rows = needed if len(needed) else everything
            step = self._replay(run, batch, index, rows)
            if fresh:
                self._check_ratio(run, step.log_prob, batch.old_log_probs[index, rows])
            part = (weights[index, rows] * step.log_prob).sum()
            if held:
                part = part + self._hold(run, batch, index, step, len(learned))
            backward(batch.share * part)
        new = fresh or batch.first_pass
        return {"loss": batch.share * output.loss, **self._metrics(run, batch, new), **output.metrics}

    def _check_ratio(self, run: Run, log_prob: Tensor, old: Tensor) -> None:
        """Compare the log-probs before any update with those recorded while sampling.

        Raises:
            RatioError: they differ by more than `ratio_tolerance`; in half precision, where batches of another size
                round otherwise, by more than `HALF_TOLERANCE`, and a smaller difference is noted once.
        """
        worst = float((log_prob.detach() - old).exp().sub(1).abs().max())
        if worst <= self.ratio_tolerance:
            return
        with run.autocast():
            half = torch.is_autocast_enabled(run.generator.device.type)
        half = half or run.generator.dtype in (torch.bfloat16, torch.float16)
        if not (half and worst <= HALF_TOLERANCE):
            raise RatioError(RATIO_FAULT.format(worst=worst, tolerance=self.ratio_tolerance))
        if not self._noted_rounding:
            note(
                f"warning: before the first update of a round the importance ratio is off by {worst:.2g}, which half "
                f"precision explains; method.clip well below that is noise (trainer.precision fp32 is exact)"
            )
        self._noted_rounding = True

    def _hold(self, run: Run, batch: Rollout, index: int, step: Replay, steps: int) -> Tensor:
        """Return the terms that hold a recorded step, one of so many, to the reference's."""
        terms = []
        if self.kl_weight:
            assert batch.reference_means is not None
            kl = gaussian_kl(step.mean, batch.reference_means[index], step.std).mean()
            terms.append(self.kl_weight * self.kl_units(run, batch)[index] / steps * kl)
        if self.distance_weight:
            assert batch.reference_outputs is not None
            distance = denoising_error(step.predicted, batch.reference_outputs[index]).mean()
            terms.append(self.distance_weight / steps * distance)
        return torch.stack(terms).sum()

    def _metrics(self, run: Run, batch: Rollout, new: bool) -> dict[str, Tensor | float]:
        ratio = (batch.log_probs.detach() - batch.old_log_probs).abs()
        metrics: dict[str, Tensor | float] = {"log_ratio_mean": ratio.mean(), "log_ratio_max": ratio.max()}
        if not new:
            return metrics
        metrics |= reward_metrics(batch.rewards, batch.parts)
        steps, kl = self._step_kl(run, batch)
        return {**metrics, **self.kl_metrics(run, batch, steps, kl)}

    def kl_metrics(
        self, run: Run, batch: Rollout, steps: list[int], kl: Float[Tensor, "steps rows"]
    ) -> dict[str, Tensor | float]:
        """Return what is logged of the KL to the reference, in nats per dimension, at some recorded steps."""
        return {"kl": kl.mean()}

    def _step_kl(self, run: Run, batch: Rollout) -> tuple[list[int], Float[Tensor, "steps rows"]]:
        """Return the KL to the reference at the learned steps; of a random step and a few samples if need be."""
        means, stds, steps = batch.old_means, batch.stds, batch.learned_steps()
        if batch.reference_means is not None:
            theirs = batch.reference_means[steps].flatten(0, 1)
            kl = gaussian_kl(means[steps].flatten(0, 1), theirs, stds[steps].flatten())
            return steps, kl.view(len(steps), -1)
        index = steps[int(torch.randint(len(steps), (1,), generator=run.random("kl", run.step)))]
        rows = torch.arange(min(WATCHED, len(batch.rewards)), device=stds.device)
        with run.reference.active():
            reference = self._replay(run, batch, index, rows).mean
        return [index], gaussian_kl(means[index, rows], reference, stds[index, rows]).unsqueeze(0)

    def _replay(self, run: Run, batch: Rollout, index: int, rows: Int[Tensor, " rows"] | None = None) -> Replay:
        """Return a recorded step (of some rows) under the current network."""
        cond = batch.samples.cond if rows is None else batch.samples.cond[rows.cpu()]
        predict = guided_predictor(
            run.generator,
            cond,
            self.config.guidance,
            autocast=run.autocast,
            constant_negative=self.constant_negative,
        )
        made: list[Tensor] = []

        def kept(x: Tensor, t: Tensor) -> Tensor:
            made.append(predict(x, t))
            return made[0]

        step = Replay(*replay_step(run.process, batch.trajectory, index, kept, rows=rows), made[0])
        every = torch.arange(len(step.mean), device=step.mean.device) if rows is None else rows
        return step._replace(log_prob=self.log_prob(batch, index, step, every))

    @torch.no_grad()
    def replay_all(
        self, run: Run, batch: Rollout, outputs: Float[Tensor, "steps batch *latent"] | None = None
    ) -> tuple[Float[Tensor, "steps batch *latent"], Float[Tensor, "steps batch"]]:
        """Return means and log-probs of the recorded steps under the current network, without a graph.

        Steps that are not learned from, and unwanted ones, keep their recorded values. `outputs`, if given, is filled
        with the network's guided predictions at the others.
        """
        assert batch.trajectory.means is not None
        means, log_probs = batch.trajectory.means.clone(), batch.old_log_probs.clone()
        for index in batch.learned_steps():
            wanted = None if batch.wanted is None else batch.wanted[index]
            rows = None if wanted is None or bool(wanted.all()) else wanted.nonzero().flatten()
            if rows is not None and not len(rows):
                continue
            at = (index,) if rows is None else (index, rows)
            step = self._replay(run, batch, index, rows)
            means[at], log_probs[at] = step.mean, step.log_prob
            if outputs is not None:
                outputs[at] = step.predicted
        return means, log_probs
