"""Methods that sample, score, and then learn from the samples by the forward process: noise added afresh.

Nothing of the sampling is kept but the clean latents, so any sampler will do, and there are no log-probabilities. An
old policy, a copy of the trainable weights, follows the policy; a method says whether it draws the samples, and
whether it follows once a round or at every update. An update noises every sample to a few levels, and computes
policy, old policy and reference there; one level at a time, so that memory does not grow with the levels. The copy
takes the place of the weights in the one network there is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, StrictInt, model_validator
from torch import Tensor

from mmalign.core.ema import Shadow
from mmalign.core.errors import UserError
from mmalign.data.batches import PromptBatch
from mmalign.losses import denoising_error, old_policy_decay
from mmalign.methods.base import LossOutput, Method, Needs, TimestepRange
from mmalign.methods.group_rewards import GroupRewardConfig, advantages_of_round, reward_metrics, score_groups
from mmalign.methods.mini_batches import cut_round
from mmalign.methods.noising import Noised
from mmalign.methods.run import WATCHED, Run
from pipelines import sample
from pipelines.noise import FlowProcess, NoiseProcess

DECAYS = {"copy": (0, 0.0, 0.0), "slow": (0, 0.001, 0.5), "late": (75, 0.0075, 0.999)}
"""(flat, rate, limit) of `old_policy_decay`: types 0, 1 and 2 of DiffusionNFT's code."""
LevelGrid = Literal["schedule", "sampler", "sampler_parts"]
OldDecay = Literal["copy", "slow", "late"] | tuple[int, float, float]
SamplerSteps = tuple[StrictInt, StrictInt] | None


class ForwardProcessConfig(TimestepRange, GroupRewardConfig):
    """Base of the configurations of methods that learn by the forward process from their own samples."""

    sampling_steps: int = Field(10, ge=1)
    """steps of the deterministic sampler"""
    solver: Literal["dpm++", "ddim"] | None = None
    """sampler: ddim is Euler's method for flow models; null: dpm++ for diffusion models, ddim for flow models"""
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """classifier-free guidance scale while sampling; 1: none, as in the updates"""
    images_per_prompt: int = Field(24, ge=2)
    """images sampled for each prompt of a batch, which are compared with each other"""
    updates_per_round: int = Field(1, ge=1)
    """passes over one round of samples, at fresh noise; each is one optimiser step, or one for each mini-batch"""
    mini_batches: int = Field(1, ge=1)
    """parts that each pass over a round is shuffled and cut into, one optimiser step each; 1: all of it at once"""
    levels: int = Field(9, ge=1)
    """noise levels at which an update trains on an image"""
    level_grid: LevelGrid = "schedule"
    """schedule: one level in each of as many equal parts of the training levels; sampler: so many of the sampler's;
    sampler_parts: one of the sampler's in each of as many equal parts of its steps"""
    sampler_steps: SamplerSteps = None
    """steps of the sampler, [first, end), whose levels are trained on; 0 is the noisiest; null: all"""
    shared_levels: bool = False
    """the images of an update have one level at a time, instead of one each"""
    old_decay: OldDecay = "slow"
    """how the old policy follows: copy, slow and late are types 0, 1 and 2 of the code; or [flat, rate, limit]"""
    advantage_std: Literal["group", "batch", "none"] = "batch"
    """an advantage is in units of the spread of: group, the prompt's rewards; batch, those of the round; none: of 1"""
    reference_weight: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """adds this many times the mean squared difference of the predictions of policy and reference"""

    @model_validator(mode="after")
    def _possible(self) -> ForwardProcessConfig:
        old_policy_decay(0, **self.decay())
        if self.level_grid == "schedule" and self.sampler_steps is not None:
            raise ValueError("sampler_steps is for level_grid: sampler and sampler_parts; set sampler_steps: null")
        if self.level_grid == "schedule":
            return self
        steps = self.trained_steps()
        if not (0 <= steps.start < steps.stop <= self.sampling_steps):
            raise ValueError(
                f"sampler_steps [{steps.start}, {steps.stop}] must satisfy 0 <= first < end <= sampling_steps "
                f"{self.sampling_steps}"
            )
        if self.levels > len(steps):
            limit = "sampling_steps" if self.sampler_steps is None else "the number of sampler_steps,"
            raise ValueError(
                f"levels {self.levels} of level_grid: {self.level_grid} are more than {limit} {len(steps)}"
            )
        if self.timesteps != (0.0, 1.0):
            raise ValueError("timesteps is for level_grid: schedule; remove it")
        return self

    def trained_steps(self) -> range:
        """Return the steps of the sampler whose levels are trained on."""
        return range(*(self.sampler_steps or (0, self.sampling_steps)))

    def decay(self) -> dict[str, Any]:
        """Return the old policy's schedule, the arguments of `old_policy_decay`."""
        given = DECAYS[self.old_decay] if isinstance(self.old_decay, str) else self.old_decay
        return dict(zip(("flat", "rate", "limit"), given, strict=True))


@dataclass
class ScoredSamples:
    """Samples of the old policy for one micro-batch, ordered by prompt, and what they scored."""

    samples: PromptBatch
    latents: Float[Tensor, "batch *latent"]
    rewards: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]]
    grid: Shaped[Tensor, " steps"]
    """The levels that the sampler went through, on the CPU."""
    drawn_at: int
    advantages: Float[Tensor, " batch"]
    novelty: Float[Tensor, " batch"] | None = None
    share: float = 1.0
    """Weight of the loss; the micro-batches of a mini-batch add up to its mean."""
    first_pass: bool = False
    """Whether this is part of a mini-batch of the first pass over a round, in which rewards are logged."""

    def select(self, rows: Int[Tensor, " rows"], share: float, first_pass: bool) -> ScoredSamples:
        """Return some of the samples, by their numbers."""
        return replace(
            self,
            samples=self.samples.select(rows),
            latents=self.latents[rows],
            rewards=self.rewards[rows],
            parts={name: scores[rows] for name, scores in self.parts.items()},
            advantages=self.advantages[rows],
            novelty=None,  # it is in the advantages
            share=share,
            first_pass=first_pass,
        )


@dataclass(frozen=True)
class NoisedSamples:
    """Samples at one noise level each, with their noise levels sigma, advantages, and the predictions to compare."""

    noised: Noised
    sigma: Float[Tensor, " batch"]
    advantages: Float[Tensor, " batch"]
    policy: Float[Tensor, "batch *latent"]
    """With its graph."""
    old: Float[Tensor, "batch *latent"]
    reference: Float[Tensor, "watched *latent"]
    """Of all samples if the loss needs it; else of the first few, for the log."""
    drawn_at: int
    """The step at which the samples were drawn."""


ConfigT = TypeVar("ConfigT", bound=ForwardProcessConfig)


class ForwardProcessMethod(Method[ConfigT]):
    """Base of methods that learn by the forward process from their own samples; `loss` takes `NoisedSamples`."""

    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="blackbox")
    old: Shadow
    """The old policy's weights."""
    follows: ClassVar[Literal["round", "update"]] = "round"
    """When the old policy follows: before it samples, once a round, or after every update."""
    compares_images: ClassVar[bool] = False
    """Whether the loss compares the images of a prompt, so that a mini-batch takes all of them or none."""

    def __init__(self, config: ConfigT) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.images_per_sample = config.images_per_prompt
        self.updates_per_round = config.updates_per_round * config.mini_batches

    @abstractmethod
    def loss(self, run: Run, batch: NoisedSamples) -> LossOutput:
        """Return the objective at one noise level; the term of the reference is added to it."""

    @property
    def whole_reference(self) -> bool:
        """Whether the loss needs the reference's prediction of every sample."""
        return self.config.reference_weight > 0

    def sampler(self, run: Run) -> AbstractContextManager[None]:
        """Return the context for sampling; by default the old policy samples."""
        return self.old.applied()

    def reference(self, run: Run, noised: Noised) -> Float[Tensor, "batch *latent"]:
        """Return the reference's prediction, without a graph."""
        return run.reference.predict(noised.x_t, noised.t, noised.cond)

    def noise_names(self, samples: PromptBatch) -> list[str]:
        """Return whose noise each sample gets; by default its own."""
        return samples.ids

    def check(self, process: NoiseProcess) -> None:
        """Refuse a model that does not predict a velocity, a sampler without such steps, or more levels than it has.

        An error of a velocity is sigma times as large in the clean sample; that of a predicted noise sigma / alpha
        times, 14.6 at the noisiest level of Stable Diffusion 1.5, and training such models is reported to fail.
        """
        c = self.config
        if process.prediction not in ("v_prediction", "flow"):
            raise UserError(
                f"{self.name} is for models that predict a velocity (v_prediction, flow); this one predicts "
                f"{process.prediction}: the objective is linear in the velocity, and with epsilon it blows errors up "
                "at high noise and is reported to fail; choose ddpo or prdp, or a v-prediction model"
            )
        process.check_steps(c.sampling_steps)
        low, high = c.timestep_bounds(process.num_train_timesteps)
        if c.levels > high - low:
            raise UserError(f"method.levels {c.levels} are more than the {high - low} levels of method.timesteps")
        spread = c.levels > 1 or c.level_grid != "schedule"
        if spread and isinstance(process, FlowProcess) and process.density.kind != "uniform":
            raise UserError(
                f"flow.density {process.density.kind}: method '{self.name}' spreads its noise levels over the whole "
                "schedule; remove it, or set method.levels: 1 with method.level_grid: schedule"
            )

    def begin(self, run: Run) -> None:
        """Copy the trainable weights: the old policy starts as the policy."""
        named = run.generator.network.named_parameters()
        self.old = Shadow({name: one for name, one in named if one.requires_grad})

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[ScoredSamples]:
        """Sample and score, and turn the rewards of the round into advantages."""
        if self.follows == "round":
            self.old.follow(self._decay(run.step))
        with self.sampler(run):
            drawn = [self._draw(run, batch.repeat(self.config.images_per_prompt)) for batch in batches]
        found = advantages_of_round(run, self.config, drawn)
        return [replace(one, advantages=advantages) for one, advantages in zip(drawn, found, strict=True)]

    def split(self, run: Run, collected: Iterable[ScoredSamples]) -> Sequence[Sequence[ScoredSamples]]:
        """Pass over the round `updates_per_round` times, each time shuffled and cut into `mini_batches`."""
        c, source = self.config, partial(run.random, "mini-batches", run.step)
        unit = c.images_per_prompt if self.compares_images else 1
        return cut_round(list(collected), c.updates_per_round, c.mini_batches, unit=unit, source=source)

    def learn(
        self, run: Run, batch: ScoredSamples, backward: Callable[[Tensor], None]
    ) -> Mapping[str, Tensor | float]:
        """Add the gradient at each noise level, a mean over them."""
        c, rows = self.config, []
        for level in range(c.levels):
            noised = self._noised(run, batch, level)
            output, distance = self.loss(run, noised), self._distance(noised)
            total = output.loss + c.reference_weight * distance if c.reference_weight else output.loss
            backward(batch.share / c.levels * total)
            moved = denoising_error(noised.policy.detach(), noised.old).mean()
            row = {"loss": total, **output.metrics, "distance": distance, "old_distance": moved}
            rows.append({name: torch.as_tensor(value).detach() for name, value in row.items()})
        metrics: dict[str, Tensor | float] = {
            name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]
        }
        if batch.first_pass or batch.drawn_at == run.step:
            metrics |= reward_metrics(batch.rewards, batch.parts)
            metrics["flat"] = (batch.advantages == 0).float().mean()
        return metrics

    def after_update(self, run: Run) -> None:
        """Let the old policy follow, if it does so at every update."""
        if self.follows == "update":
            self.old.follow(self._decay(run.step))

    def tensors(self) -> dict[str, Tensor]:
        """Return the old policy's weights."""
        return self.old.shadow

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the old policy's weights."""
        self.old.restore(dict(tensors))

    @torch.no_grad()
    def _draw(self, run: Run, samples: PromptBatch) -> ScoredSamples:
        c = self.config
        trajectory = sample(
            run.generator,
            samples.cond,
            steps=c.sampling_steps,
            guidance=c.guidance,
            solver=c.solver or ("ddim" if run.process.prediction == "flow" else "dpm++"),
            seeds=run.seeds(samples.ids, samples.epoch),
            autocast=run.autocast,
        )
        images = run.decode(trajectory.latents)
        run.show(images, samples.prompts)
        scores = score_groups(run, c, images, samples.prompts, c.images_per_prompt)
        return ScoredSamples(
            samples,
            trajectory.latents,
            scores.total,
            scores.parts,
            trajectory.timesteps,
            run.step,
            torch.zeros_like(scores.total),
            scores.novelty,
        )

    def _noised(self, run: Run, batch: ScoredSamples, level: int) -> NoisedSamples:
        """Return the samples at their `level`-th noise level, with policy and old policy there."""
        samples, x0, update = batch.samples, batch.latents, run.step - batch.drawn_at
        t = torch.stack([self._level(run, batch, name, level) for name in samples.ids]).to(x0.device)
        names = self.noise_names(samples)
        noise = run.noise_like(x0, names, samples.epoch, f"noise {update} {level}").to(x0.dtype)
        x_t, target = run.process.add_noise(x0, noise, t), run.process.target(x0, noise, t)
        noised = Noised(x_t, t, target, samples.cond)
        policy = run.predict(x_t, t, samples.cond)
        if self._old_is_policy(run.step, batch.drawn_at):
            old = policy.detach()
        else:
            old = predict_by(run, self.old, noised)
        rows = slice(len(t) if self.whole_reference else WATCHED)
        reference = self.reference(run, noised.select(rows))
        return NoisedSamples(noised, run.process.sigma(t), batch.advantages, policy, old, reference, batch.drawn_at)

    def _decay(self, step: int) -> float:
        return old_policy_decay(step, **self.config.decay())

    def _old_is_policy(self, step: int, drawn_at: int) -> bool:
        """Tell whether the old policy followed with decay 0 and there has been no update since."""
        if self.follows == "update":
            return step == 0 or self._decay(step - 1) == 0
        return step == drawn_at and self._decay(drawn_at) == 0

    def _level(self, run: Run, batch: ScoredSamples, name: str, level: int) -> Tensor:
        """Return the `level`-th noise level of a sample in this update."""
        c, update = self.config, run.step - batch.drawn_at
        whose = ("all", batch.drawn_at) if c.shared_levels else (name, batch.samples.epoch)
        if c.level_grid == "sampler":
            steps = c.trained_steps()
            order = torch.randperm(len(steps), generator=run.random("levels", *whose, update))
            return batch.grid[steps.start + order[level]]
        source = run.random("levels", *whose, update, level)
        if c.level_grid == "sampler_parts":
            low, high = _part(c.trained_steps(), level, c.levels)
            return batch.grid[torch.randint(low, high, (), generator=source)]
        low, high = c.timestep_bounds(run.process.num_train_timesteps)
        low, high = _part(range(low, high), level, c.levels)
        return run.process.sample_timesteps(1, generator=source, low=low, high=high)[0]

    def _distance(self, batch: NoisedSamples) -> Tensor:
        """Return the mean squared difference of policy and reference; of a few samples if it is only logged."""
        policy = batch.policy if self.config.reference_weight else batch.policy.detach()
        return denoising_error(policy[: len(batch.reference)], batch.reference).mean()


@torch.no_grad()
def predict_by(run: Run, weights: Shadow, noised: Noised) -> Float[Tensor, "batch *latent"]:
    """Return the prediction of an earlier policy, without a graph."""
    with weights.applied():
        return run.predict(noised.x_t, noised.t, noised.cond)


def _part(whole: range, number: int, parts: int) -> tuple[int, int]:
    """Return the bounds of one of so many equal parts of a range."""
    low, high = (whole.start + len(whole) * end // parts for end in (number, number + 1))
    return low, high
