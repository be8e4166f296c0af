"""Flow-GRPO and relatives: group-relative policy gradient on a few random sampling steps (arXiv 2505.05470).

MixGRPO (arXiv 2507.21802), DanceGRPO (arXiv 2505.07818), FlowCPS (arXiv 2509.05952), GRPO-Guard (arXiv 2510.22319),
Flow-DPPO, TempFlow-GRPO (arXiv 2508.04324) and Flash-GRPO (arXiv 2605.15980) are options: docs/methods/flow_grpo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.data.batches import PromptBatch
from mmalign.losses import (
    clipped_policy_gradient,
    gaussian_kl,
    guard_log_ratio,
    masked_policy_gradient,
    squared_error_log_prob,
)
from mmalign.methods.advantages import (
    drawn_steps,
    mean_of_drawn,
    round_metrics,
    warn_of_few_groups,
    weigh_samples_alike,
    with_advantages,
    without_zeros,
)
from mmalign.methods.base import LossOutput, Needs
from mmalign.methods.flow_grpo_config import FlowGRPOConfig
from mmalign.methods.group_rewards import advantages_of_round, score_groups
from mmalign.methods.rollout import Replay, Rollout, RolloutMethod, SamplingPlan
from mmalign.methods.run import Run
from mmalign.methods.step_weights import kl_units, recorded_steps, step_weights
from mmalign.scoring.live import Scores
from pipelines import named_kernel, seeded_noise
from pipelines.noise import NoiseProcess


class FlowGRPO(RolloutMethod[FlowGRPOConfig]):
    """Raise the probability of random steps that led to images better than the group's average; for any reward."""

    name: ClassVar[str] = "flow_grpo"
    Config = FlowGRPOConfig
    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="blackbox")
    compares_images: ClassVar[bool] = False
    ratio_tolerance: ClassVar[float] = 1e-5

    def __init__(self, config: FlowGRPOConfig) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.whole_first = config.timestep_fraction == 1
        in_velocity = config.kl.form == "v"
        self.kl_weight = 0.0 if in_velocity else config.kl.weight
        self.distance_weight = config.kl.weight if in_velocity else 0.0
        self.constant_negative = config.uncond_grad == "detached"
        self._round: dict[str, Tensor | float] = {}
        self._warned = False

    def check(self, process: NoiseProcess) -> None:
        """Refuse a kernel that does not hold for the model, and windows with a step that adds no noise."""
        self.config.check(process)

    def describe(self) -> str:
        """Return the conventions."""
        return f"flow_grpo: {self.config.describe()}"

    def plan(self, run: Run) -> SamplingPlan:
        """Return the kernel with noise in the round's window alone; only the window is recorded."""
        c, window = self.config, self.window(run)
        amounts = [c.amount() if step in window else 0.0 for step in range(c.sampling_steps)]
        return SamplingPlan(named_kernel(c.kernel, amounts), c.schedule(run.process), window, range(len(window)))

    def window(self, run: Run) -> range:
        """Return the window of the present round, the same in every process and after a resume."""
        number = run.step // self.updates_per_round
        return self.config.window.of_round(number, self.config.sampling_steps, run.random("window", number))

    def initial_noise(self, run: Run, seeds: Sequence[int]) -> Float[Tensor, "batch *latent"] | None:
        """Return for all images of a group the noise of its first, if they share it."""
        if not self.config.same_noise:
            return None
        size = self.config.images_per_prompt
        first = [seeds[row - row % size] for row in range(len(seeds))]
        return seeded_noise(first, run.generator.latent_shape, device=run.generator.device)

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[Rollout]:
        """Sample, score, and turn the rewards of the whole round, on all processes, into advantages."""
        rollouts = super().collect(run, batches)
        for rollout in rollouts:
            every = torch.arange(len(rollout.rewards), device=rollout.rewards.device)
            drawn = zip(rollout.old_means, rollout.stds, rollout.old_log_probs, rollout.old_means, strict=True)
            found = [self.log_prob(rollout, i, Replay(*step), every) for i, step in enumerate(drawn)]
            rollout.old_log_probs = rollout.log_probs = torch.stack(found)
        with_advantages(rollouts, advantages_of_round(run, self.config, rollouts, self.config.advantage_clip))
        self._round = round_metrics(rollouts, self.config.images_per_prompt) | {"window": float(self.window(run)[0])}
        if not self._warned:
            warn_of_few_groups(rollouts, self.config.images_per_prompt)
        self._warned = True
        return rollouts

    def scores(self, run: Run, images: Tensor, samples: PromptBatch) -> Scores:
        """Return the rewards of the samples, or how many comparisons they win."""
        return score_groups(run, self.config, images, samples.prompts, self.config.images_per_prompt)

    def split(self, run: Run, collected: Iterable[Rollout]) -> Sequence[Sequence[Rollout]]:
        """Drop samples of advantage 0, then pass over the others in shuffled mini-batches."""
        held = list(collected)
        kept = without_zeros(held, self.config.mini_batches)
        return weigh_samples_alike(super().split(run, kept), len(held))

    def log_prob(self, batch: Rollout, index: int, step: Replay, rows: Int[Tensor, " rows"]) -> Tensor:
        """Return the log-probability of the configured kind, or for Guard the log-ratio."""
        assert batch.trajectory.states is not None
        kind, after = self.config.log_prob_kind(), batch.trajectory.states[index + 1][rows]
        if kind == "guard":
            return guard_log_ratio(after, step.mean, batch.old_means[index][rows], step.std)
        return squared_error_log_prob(after, step.mean) if kind == "cps" else step.log_prob

    def learn(self, run: Run, batch: Rollout, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Train each image on the steps of the window drawn for it; log the rewards of the whole round."""
        batch.wanted = drawn_steps(run, batch, self.config.timestep_fraction)
        metrics = super().learn(run, batch, backward)
        return {**metrics, **self._round} if "reward" in metrics else metrics

    def loss(self, run: Run, batch: Rollout) -> LossOutput:
        """Return the weighted objective, a mean over images and the trained steps."""
        c, steps = self.config, batch.learned_steps()
        assert batch.advantages is not None and batch.means is not None
        now, old = batch.log_probs[steps], batch.old_log_probs[steps]
        advantages = batch.advantages.expand_as(now)
        if c.ratio == "dppo":
            moved = torch.stack([gaussian_kl(batch.means[i], batch.old_means[i], batch.stds[i]) for i in steps])
            losses = masked_policy_gradient(now, old, advantages, moved, limit=c.clip)
            clipped = (losses == 0) & (advantages != 0)
        else:
            losses = clipped_policy_gradient(now, old, advantages, clip=c.clip)
            clipped = ((now.detach() - old).exp() - 1).abs() > c.clip
        pool = c.pool(run.process) if c.step_weight == "flash" else []
        weights = step_weights(c.step_weight, run.process, recorded_steps(batch.trajectory), pool)
        return mean_of_drawn(batch, losses * weights[steps].to(losses).unsqueeze(1), clipped)

    def kl_units(self, run: Run, batch: Rollout) -> list[float]:
        """Return what the KL of each step is multiplied by in the configured form."""
        return kl_units(self.config.kl.form, run.process, recorded_steps(batch.trajectory))

    def kl_metrics(
        self, run: Run, batch: Rollout, steps: list[int], kl: Float[Tensor, "steps rows"]
    ) -> dict[str, Tensor | float]:
        """Return the KL, and beside it what Flow-GRPO's code has for it."""
        units = kl.new_tensor(kl_units("code", run.process, recorded_steps(batch.trajectory)))[steps]
        return {"kl": kl.mean(), "kl_code": (kl * units.unsqueeze(1)).mean()}
