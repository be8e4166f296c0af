"""Methods with recorded trajectories: sample with the policy, score, then learn from the log-probs of the steps.

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
from typing import Annotated, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from mmalign.core.errors import TrainingDiverged, UserError
from mmalign.data.batches import PromptBatch
from mmalign.losses import denoising_error, gaussian_kl
from mmalign.methods.base import LossOutput, Method, MethodConfig, Needs
from mmalign.methods.mini_batches import cut_round
from mmalign.methods.run import WATCHED, Run
from mmalign.scoring.live import Scores
from pipelines import Kernel, ddim, sample
from pipelines.guidance import guided_predictor
from pipelines.noise import NoiseProcess
from pipelines.sampling import Trajectory, replay_step

RATIO_TOLERANCE = 1e-4


class RatioError(TrainingDiverged):
    """Sampling and learning compute different log-probabilities, so importance ratios are not meaningful."""


class SamplingConfig(MethodConfig):
    """Sampling options of methods that learn from their own samples."""

    sampling_steps: int = Field(50, ge=1)
    """steps of the DDIM sampler"""
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """classifier-free guidance scale while sampling and learning; 1: none"""
    eta: float = Field(1.0, ge=0, le=1)
    """noise of the sampler: 1 as in DDPM, 0 deterministic"""
    images_per_prompt: int = Field(1, ge=1)
    """images sampled for each prompt of a batch"""


class RandomSamplingConfig(SamplingConfig):
    """Base of the configurations of methods that learn from the random steps of their samples."""

    random_steps: tuple[float, float] = (0.0, 1.0)
    """part of the sampling (0 is its start) whose steps are random; the others are deterministic"""
    learned_steps: tuple[float, float] | None = None
    """part of the sampling whose random steps are trained on; null: all random steps"""
    updates_per_round: int = Field(1, ge=1)
    """passes over one round of samples; each is one optimiser step, or one for each of its mini-batches"""
    mini_batches: int = Field(1, ge=1)
    """parts that each pass over a round is shuffled and cut into, one optimiser step each; 1: all of it at once"""


class TrajectoryConfig(RandomSamplingConfig):
    """Base of the configurations of methods that learn from recorded trajectories."""

    kl_weight: float = Field(0.0, ge=0)
    """adds this many times the KL divergence to the reference, a mean over learned sampling steps and dimensions"""
    distance_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of the guided predictions of policy and reference"""


@dataclass
class Rollout:
    """Samples of one micro-batch, ordered by prompt, with their recorded steps; log-probs are means over dimensions.

    `old_means` and `old_log_probs` are the policy's at the start of the round, `log_probs` those of the current policy
    (set before `loss` is called; the loss is differentiated by it), `reference_log_probs` those of the reference
    model.
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
    reference_log_probs: Float[Tensor, "steps batch"] | None = None
    reference_means: Float[Tensor, "steps batch *latent"] | None = None
    reference_outputs: Float[Tensor, "steps batch *latent"] | None = None
    """The reference's guided predictions, where `distance_weight` needs them."""
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
            reference_log_probs=of_steps(self.reference_log_probs),
            reference_means=of_steps(self.reference_means),
            reference_outputs=of_steps(self.reference_outputs),
            advantages=None if self.advantages is None else self.advantages[rows],
            wanted=of_steps(self.wanted),
            share=share,
            first_pass=first_pass,
        )

    def learned_steps(self) -> list[int]:
        """Return the steps that are learned from: those of the chosen part that have a density."""
        return [index for index in (self.stds > 0).all(1).nonzero().flatten().tolist() if index in self.learned]


SamplingT = TypeVar("SamplingT", bound=RandomSamplingConfig)
ConfigT = TypeVar("ConfigT", bound=TrajectoryConfig)


class SamplingMethod(Method[SamplingT]):
    """Base of methods whose samples have random steps: the selection of these steps, and checks of the sampler."""

    def __init__(self, config: SamplingT) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.images_per_sample = config.images_per_prompt
        self.updates_per_round = config.updates_per_round * config.mini_batches

    def check(self, process: NoiseProcess) -> None:
        """Refuse a sampler without randomness, or one that the schedule does not support."""
        if self.config.eta == 0:
            raise UserError(
                f"method.eta is 0, and {self.name} needs a random sampler: without noise a step has no density; "
                "set method.eta to 1"
            )
        c, stds = self.config, self.kernel().stds(process, self.config.sampling_steps)
        for name, steps in (("random_steps", range(len(stds))), ("learned_steps", self.learned())):
            if not any(stds[step] for step in steps):
                raise UserError(
                    f"method.{name} {list(getattr(c, name) or c.random_steps)} holds none of the {c.sampling_steps} "
                    "steps that have noise; 0 <= start < end <= 1 is needed, such as [0.0, 0.5] (the last may have "
                    "none)"
                )

    def kernel(self) -> Kernel:
        """Return the kernel of the sampling: DDIM of noise eta in the random part, 0 elsewhere."""
        c = self.config
        random = self._part(c.random_steps)
        return ddim([c.eta if index in random else 0.0 for index in range(c.sampling_steps)])

    def learned(self) -> range:
        """Return the part of the sampling whose random steps are learned from."""
        return self._part(self.config.learned_steps or (0.0, 1.0))

    def _part(self, shares: tuple[float, float]) -> range:
        """Return a part of the sampling, given by its start and its end as shares, in steps."""
        low, high = (round(share * self.config.sampling_steps) for share in shares)
        return range(self.config.sampling_steps)[max(low, 0) : max(high, 0)]


class TrajectoryMethod(SamplingMethod[ConfigT]):
    """Base of methods that learn from the log-probabilities of their own samples; `loss` takes a `Rollout`."""

    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="blackbox")
    compares_images: ClassVar[bool] = True
    """Whether the loss compares the images of a prompt, so that a mini-batch takes all of them or none."""
    whole_reference: ClassVar[bool] = False
    """Whether the reference's log-probs are wanted at every step; otherwise one step a round is enough to watch by."""
    whole_first: bool = True
    """Whether the first update of a round computes all samples of a step, in the batches in which they were drawn."""

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

    @torch.no_grad()
    def _draw(self, run: Run, samples: PromptBatch) -> Rollout:
        c = self.config
        with self.sampler(run):
            trajectory = sample(
                run.generator,
                samples.cond,
                steps=c.sampling_steps,
                guidance=c.guidance,
                kernel=self.kernel(),
                seeds=run.seeds(samples.ids, samples.epoch),
                record=True,
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
            old_means=trajectory.means,
            old_log_probs=trajectory.log_probs,
            log_probs=trajectory.log_probs,
            drawn_at=run.step,
            learned=self.learned(),
        )
        if self.whole_reference or c.kl_weight or c.distance_weight:
            outputs = torch.zeros_like(trajectory.means) if c.distance_weight else None
            with run.reference.active():
                rollout.reference_means, rollout.reference_log_probs = self.replay_all(run, rollout, outputs)
            rollout.reference_outputs = outputs
        return rollout

    def learn(self, run: Run, batch: Rollout, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Differentiate the objective by the log-probs, then recompute the sampling steps one by one with a graph."""
        c, fresh = self.config, batch.drawn_at == run.step
        held = bool(c.kl_weight or c.distance_weight)
        present = batch.old_log_probs if fresh else self.replay_all(run, batch)[1]
        batch.log_probs = present.clone().requires_grad_()
        output = self.loss(run, batch)
        (weights,) = torch.autograd.grad(output.loss, batch.log_probs)
        learned = batch.learned_steps()
        everything = torch.arange(weights.shape[1], device=weights.device)
        # At least one step is computed, so that there is always a gradient, even if it is zero.
        for index in [i for i in learned if held or bool(weights[i].any())] or learned[:1]:
            # The first update takes all rows, in the batches in which they were sampled: the ratio is exactly 1.
            needed = everything if (fresh and self.whole_first) or held else weights[index].nonzero().flatten()
            rows = needed if len(needed) else everything
            mean, std, log_prob, predicted = self._replay(run, batch, index, rows)
            if fresh:
                _check_ratio(log_prob, batch.old_log_probs[index, rows])
            part = (weights[index, rows] * log_prob).sum()
            if c.kl_weight:
                assert batch.reference_means is not None
                kl = gaussian_kl(mean, batch.reference_means[index], std).mean()
                part = part + c.kl_weight / len(learned) * kl
            if c.distance_weight:
                assert batch.reference_outputs is not None
                distance = denoising_error(predicted, batch.reference_outputs[index]).mean()
                part = part + c.distance_weight / len(learned) * distance
            backward(batch.share * part)
        new = fresh or batch.first_pass
        return {"loss": output.loss, **self._metrics(run, batch, new), **output.metrics}

    def _metrics(self, run: Run, batch: Rollout, new: bool) -> dict[str, Tensor | float]:
        ratio = (batch.log_probs.detach() - batch.old_log_probs).abs()
        metrics: dict[str, Tensor | float] = {"log_ratio_mean": ratio.mean(), "log_ratio_max": ratio.max()}
        if not new:
            return metrics
        metrics |= {"reward": batch.rewards.mean(), "reward_std": batch.rewards.std(correction=0)}
        metrics |= {f"reward/{name}": score.mean() for name, score in batch.parts.items()}
        return {**metrics, "kl": self._kl(run, batch)}

    def _kl(self, run: Run, batch: Rollout) -> Tensor:
        """Return the KL of a sampling step to the reference in nats per dimension; of a random step if need be."""
        means, stds, steps = batch.old_means, batch.stds, batch.learned_steps()
        if batch.reference_means is not None:
            return gaussian_kl(
                means[steps].flatten(0, 1), batch.reference_means[steps].flatten(0, 1), stds[steps].flatten()
            ).mean()
        index = steps[int(torch.randint(len(steps), (1,), generator=run.random("kl", run.step)))]
        rows = torch.arange(min(WATCHED, len(batch.rewards)), device=stds.device)
        with run.reference.active():
            reference = self._replay(run, batch, index, rows)[0]
        return gaussian_kl(means[index, rows], reference, stds[index, rows]).mean()

    def _replay(
        self, run: Run, batch: Rollout, index: int, rows: Int[Tensor, " rows"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean, std, log-prob and prediction of a recorded step (of some rows) under the current network."""
        cond = batch.samples.cond if rows is None else batch.samples.cond[rows.cpu()]
        predict = guided_predictor(run.generator, cond, self.config.guidance, autocast=run.autocast)
        made: list[Tensor] = []

        def kept(x: Tensor, t: Tensor) -> Tensor:
            made.append(predict(x, t))
            return made[0]

        return *replay_step(run.process, batch.trajectory, index, kept, rows=rows), made[0]

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
            means[at], _, log_probs[at], predicted = self._replay(run, batch, index, rows)
            if outputs is not None:
                outputs[at] = predicted
        return means, log_probs


def _check_ratio(log_prob: Tensor, old: Tensor) -> None:
    """Raise a RatioError if the log-probs before any update differ from those recorded while sampling."""
    worst = float((log_prob.detach() - old).exp().sub(1).abs().max())
    if not worst <= RATIO_TOLERANCE:
        raise RatioError(
            f"before the first update of a round the importance ratio must be 1, and it is off by {worst:.2g} "
            f"(allowed {RATIO_TOLERANCE:g}): sampling and learning do not compute the same. Usual causes: dropout "
            "in the network, kernels that round otherwise with a gradient (trainer.precision fp32 shows it), or an "
            "attention kernel that is not deterministic"
        )
