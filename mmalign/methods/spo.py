"""SPO: step-by-step preference on the policy's own samples (arXiv 2406.04314); objective: `mmalign.losses.spo`.

At every random sampling step several candidates are drawn from the same state and scored; the best is preferred over
the worst, so both sides of a pair have the same past. Steps are judged by the rewards of the decoded clean image that
the network predicts from a candidate; a reward that reads noisy latents overrides `SPO.step_scores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.data.batches import PromptBatch
from mmalign.losses import dynamic_threshold, gaussian_kl, spo, spo_logit, step_preference
from mmalign.methods.base import LossOutput, Needs
from mmalign.methods.noising import pair_accuracy
from mmalign.methods.run import Run
from mmalign.methods.step_pairs import StepPairs, split_pairs
from mmalign.methods.trajectory import RandomSamplingConfig, SamplingMethod
from pipelines.branching import Branching, sample_branching
from pipelines.guidance import guided_predictor
from pipelines.sampling import gaussian_log_prob


class SPOConfig(RandomSamplingConfig):
    """Configuration of `spo`; ratios are of densities per latent dimension, as in the authors' code."""

    candidates: int = Field(4, ge=2)
    """continuations sampled and scored at each random step"""
    beta: float = Field(10.0, gt=0)
    """factor from the difference of log-ratios to the logit"""
    clip: float = Field(0.1, gt=0, lt=1)
    """ratios to the reference outside 1 +- clip give no gradient"""
    threshold: tuple[float, float] = (0.3, 0.3)
    """softmax gap of best and worst that a pair must exceed, at the sampler's least and at its largest noise"""
    score_scale: float = Field(1.0, gt=0)
    """factor on the rewards before the softmax"""
    mini_batch_size: int | None = Field(None, ge=1)
    """pairs of each optimiser step, on each process, in place of `mini_batches`: a round then has as many steps as its
    pairs above the threshold fill; null: see mini_batches"""

    @model_validator(mode="after")
    def _thresholds_are_gaps(self) -> SPOConfig:
        if self.mini_batch_size is not None and self.mini_batches > 1:
            raise ValueError(f"mini_batch_size {self.mini_batch_size} and mini_batches {self.mini_batches}: give one")
        if not all(0 <= one < 1 for one in self.threshold):
            raise ValueError(f"threshold {list(self.threshold)}: each gap of probabilities must satisfy 0 <= gap < 1")
        return self


class SPO(SamplingMethod[SPOConfig]):
    """Prefer, step by step, the better of a few continuations of the policy's own samples; for any reward."""

    name: ClassVar[str] = "spo"
    Config: ClassVar[type[SPOConfig]] = SPOConfig
    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="blackbox")
    predict_clean: ClassVar[bool] = True
    """Whether `step_scores` looks at the clean images predicted from the candidates."""

    def __init__(self, config: SPOConfig) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self.rounds_vary = config.mini_batch_size is not None

    def describe(self) -> str:
        """Return the conventions: the units of beta, the clip and the threshold."""
        c = self.config
        low, high = c.threshold
        gap = f"{low:g}" if low == high else f"{low:g}..{high:g} by the step's noise"
        return (
            f"{self.name}: beta={c.beta:g}, clip={c.clip:g} on ratios per dimension, best against worst of "
            f"{c.candidates} where the softmax of {c.score_scale:g} x reward differs by {gap}, guidance {c.guidance:g}"
        )

    def collect(self, run: Run, batches: Iterable[PromptBatch]) -> list[StepPairs]:
        """Sample branching chains with the current policy, score their steps, and keep the best and the worst."""
        return [pairs for batch in batches for pairs in self._draw(run, batch.repeat(self.config.images_per_prompt))]

    def split(self, run: Run, collected: Iterable[StepPairs]) -> Sequence[Sequence[StepPairs]]:
        """Learn from the whole round in each step, or drop, shuffle and cut as `split_pairs` does."""
        c = self.config
        return split_pairs(
            list(collected), run, passes=c.updates_per_round, parts=c.mini_batches, size=c.mini_batch_size
        )

    def step_scores(self, run: Run, samples: PromptBatch, step: Branching) -> Float[Tensor, "candidates batch"]:
        """Return the score of each candidate: the reward of the clean image that the policy predicts from it."""
        assert step.clean is not None
        decoded = (run.decode(clean) for clean in step.clean)
        return torch.stack([run.score(images, samples.prompts).total for images in decoded])

    def final_rewards(
        self, run: Run, samples: PromptBatch, latents: Float[Tensor, "batch *latent"]
    ) -> Float[Tensor, " batch"]:
        """Return the reward of finished samples, for the log, and hand the samples to the monitors."""
        images = run.decode(latents)
        run.show(images, samples.prompts)
        return run.score(images, samples.prompts).total

    @torch.no_grad()
    def _draw(self, run: Run, samples: PromptBatch) -> list[StepPairs]:
        c, kernel = self.config, self.kernel()
        stds = [std for std in kernel.stds(run.process, c.sampling_steps) if std > 0]
        found: list[tuple[Branching, Tensor]] = []

        def judge(step: Branching) -> None:
            threshold = dynamic_threshold(float(step.std), (min(stds), max(stds)), c.threshold)
            best, worst, valid = step_preference(c.score_scale * self.step_scores(run, samples, step), threshold)
            found.append((step.pick(best, worst), valid))

        latents = sample_branching(
            run.generator,
            samples.cond,
            kernel=kernel,
            steps=c.sampling_steps,
            candidates=c.candidates,
            seeds=run.seeds(samples.ids, samples.epoch),
            visit=judge,
            predict_clean=self.predict_clean,
            guidance=c.guidance,
            autocast=run.autocast,
        )
        rewards = self.final_rewards(run, samples, latents)
        return [StepPairs(samples, step, valid, 1 / len(found), rewards) for step, valid in found]

    def loss(self, run: Run, batch: StepPairs) -> LossOutput:
        """Return this step's part of the mean over chains and steps; pairs below the threshold count as zeros."""
        c, step = self.config, batch.step
        with run.reference.active():
            reference = self._mean(run, batch)
        policy = self._mean(run, batch)
        std = torch.as_tensor(step.std, dtype=policy.dtype, device=policy.device).expand(len(policy))
        best, worst = (
            gaussian_log_prob(candidate, policy, std) - gaussian_log_prob(candidate, reference, std)
            for candidate in step.candidates
        )
        losses = spo(best, worst, batch.valid, beta=c.beta, clip=c.clip)
        logit = spo_logit(best.detach(), worst.detach(), beta=c.beta, clip=c.clip)
        return LossOutput(
            batch.share * losses.mean(),
            {
                "loss": losses.detach().mean(),
                "reward": batch.rewards.mean(),
                "valid": batch.valid.float().mean() if batch.valid_share is None else batch.valid_share,
                "accuracy": pair_accuracy(logit),
                "kl": gaussian_kl(policy.detach(), reference, std).mean(),
            },
        )

    def _mean(self, run: Run, batch: StepPairs) -> Float[Tensor, "batch *latent"]:
        """Return the mean of the recorded step under the current network."""
        step = batch.step
        predict = guided_predictor(run.generator, batch.samples.cond, self.config.guidance, autocast=run.autocast)
        output = predict(step.state, torch.as_tensor(step.t, device=step.state.device).expand(len(step.state)))
        return step.kernel(run.process, step.state, output, step.t, step.t_next)[0]
