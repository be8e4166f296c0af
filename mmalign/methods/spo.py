"""SPO: step-by-step preference on the policy's own samples (arXiv 2406.04314); objective: `mmalign.losses.spo`.

At every learned sampling step several candidates are drawn from the same state and scored; the best is preferred over
the worst, so both sides of a pair have the same past. With `segment` they are compared a few steps later, and all
these steps of the best chain are preferred over those of the worst. Steps are judged by the rewards of the decoded
clean image that the network predicts from a candidate; a reward that reads noisy latents overrides
`SPO.step_scores`.
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
from mmalign.methods.sampling import RandomSamplingConfig, SamplingMethod
from mmalign.methods.step_pairs import StepPairs, split_pairs
from pipelines import ddim
from pipelines.branching import Branching, sample_branching
from pipelines.conditioning import Conditioning
from pipelines.guidance import guided_predictor
from pipelines.sampling import gaussian_log_prob


class SPOConfig(RandomSamplingConfig):
    """Configuration of `spo`; ratios are of densities per latent dimension, as in the authors' code."""

    candidates: int = Field(4, ge=2)
    """continuations sampled and scored at each learned step"""
    segment: int = Field(0, ge=0)
    """further steps that each candidate takes by itself before it is scored; all steps of a pair share the label"""
    beta: float = Field(10.0, gt=0)
    """factor from the difference of log-ratios to the logit"""
    clip: float = Field(0.1, gt=0, lt=1)
    """ratios to the reference outside 1 +- clip give no gradient"""
    threshold: tuple[float, float] = (0.3, 0.3)
    """softmax gap of best and worst that a pair must exceed, at the least and at the largest noise of a sampler whose
    steps are all random; below 0, the gap is 0 up to the noise at which the line between the two crosses it"""
    score_scale: float = Field(1.0, gt=0)
    """factor on the rewards before the softmax"""
    mini_batch_size: int | None = Field(None, ge=1)
    """pairs of each optimiser step, on each process, in place of `mini_batches`: a round then has as many steps as its
    pairs above the threshold fill; null: see mini_batches"""

    @model_validator(mode="after")
    def _thresholds_are_gaps(self) -> SPOConfig:
        if self.mini_batch_size is not None and self.mini_batches > 1:
            raise ValueError(f"mini_batch_size {self.mini_batch_size} and mini_batches {self.mini_batches}: give one")
        if not all(-1 < one < 1 for one in self.threshold):
            raise ValueError(f"threshold {list(self.threshold)}: each gap of probabilities must satisfy -1 < gap < 1")
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
        later = f", {c.segment} steps later," if c.segment else ""
        gap = f"{low:g}" if low == high else f"{low:g}..{high:g} by the step's noise"
        return (
            f"{self.name}: beta={c.beta:g}, clip={c.clip:g} on ratios per dimension, best against worst of "
            f"{c.candidates}{later} where the softmax of {c.score_scale:g} x reward differs by {gap}, "
            f"guidance {c.guidance:g}"
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
        table = [std for std in ddim(c.eta).stds(run.process, c.sampling_steps) if std > 0]
        found: list[tuple[Branching, Tensor]] = []

        def judge(segment: list[Branching]) -> None:
            threshold = dynamic_threshold(float(segment[0].std), (min(table), max(table)), c.threshold)
            scores = self.step_scores(run, samples, segment[-1])
            best, worst, valid = step_preference(c.score_scale * scores, threshold)
            found.extend((step.pick(best, worst), valid) for step in segment)

        latents = sample_branching(
            run.generator,
            samples.cond,
            kernel=kernel,
            steps=c.sampling_steps,
            candidates=c.candidates,
            seeds=run.seeds(samples.ids, samples.epoch),
            visit=judge,
            branch_steps=self.learned(),
            segment=c.segment,
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
            reference = self._means(run, batch)
        policy = self._means(run, batch)
        std = torch.as_tensor(step.std, dtype=policy.dtype, device=policy.device).expand(policy.shape[1])
        best, worst = (
            gaussian_log_prob(candidate, ours, std) - gaussian_log_prob(candidate, theirs, std)
            for candidate, ours, theirs in zip(
                step.candidates, policy.expand_as(step.candidates), reference.expand_as(step.candidates), strict=True
            )
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
                "kl": gaussian_kl(policy.detach()[0], reference[0], std).mean(),
            },
        )

    def _means(self, run: Run, batch: StepPairs) -> Float[Tensor, "starts batch *latent"]:
        """Return the means of the recorded step from each of its starts, under the current network."""
        step = batch.step
        starts, count = step.states.shape[:2]
        cond = Conditioning.cat([batch.samples.cond] * starts)
        predict = guided_predictor(run.generator, cond, self.config.guidance, autocast=run.autocast)
        t = torch.as_tensor(step.t, device=step.states.device).expand(count)
        outputs = predict(step.states.flatten(0, 1), t.repeat(starts)).unflatten(0, (starts, count))
        means = [
            step.kernel(run.process, state, output, step.t, step.t_next)[0]
            for state, output in zip(step.states, outputs, strict=True)
        ]
        return torch.stack(means)
