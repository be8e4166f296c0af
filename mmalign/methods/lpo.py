"""LPO: step-by-step preference scored in latent space by the first half of a diffusion UNet (arXiv 2502.01051).

The objective, the pairs and the chains are those of `mmalign.methods.spo`; the score of a candidate is that of a
latent reward (`rewards.latent`, trained by `mmalign train-reward`) on the noisy latents themselves. Nothing is decoded
and no clean image is predicted, so that a step costs one call of the denoiser for any number of candidates, and
candidates at any noise level can be scored.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmalign.core.errors import TrainingDiverged, UserError
from mmalign.core.resources import find
from mmalign.data.batches import PromptBatch
from mmalign.methods.base import Needs
from mmalign.methods.run import Run
from mmalign.methods.spo import SPO, SPOConfig
from pipelines.branching import Branching
from pipelines.noise import NoiseProcess
from rewards.backbones.latent_files import read_record
from rewards.latent import LatentReward


class LPOConfig(SPOConfig):
    """Configuration of `lpo`; defaults as published for SD1.5."""

    latent_reward: str
    """the output of `mmalign train-reward`: a directory"""
    reward_precision: Literal["fp32", "bf16"] = "fp32"
    """type of the latent reward's weights"""
    fidelity: Literal["paper", "code"] = "paper"
    """paper: score a candidate at its own noise level; code: at the level of the step before it"""
    beta: float = Field(500.0, gt=0)
    """factor from the difference of log-ratios to the logit"""
    threshold: tuple[float, float] = (0.35, 0.5)
    """softmax gap of best and worst that a pair must exceed, at the sampler's least and at its largest noise"""


class LPO(SPO):
    """Prefer, step by step, the better of a few continuations, scored as noisy latents by a latent reward."""

    name: ClassVar[str] = "lpo"
    Config: ClassVar[type[LPOConfig]] = LPOConfig
    needs: ClassVar[Needs] = Needs(source="prompts", reference=True, reward="optional", flow=False, video=False)
    predict_clean: ClassVar[bool] = False
    config: LPOConfig
    reward: LatentReward

    def check(self, process: NoiseProcess) -> None:
        """Refuse the same configurations as SPO, and a directory without a latent reward."""
        super().check(process)
        read_record(find(self.config.latent_reward))

    def begin(self, run: Run) -> None:
        """Load the latent reward and check that it uses the policy's autoencoder."""
        c, generator = self.config, run.generator
        self.reward = LatentReward(weights=find(c.latent_reward), device=generator.device, dtype=c.reward_precision)
        if not self.reward.same_latents(generator.encode):
            raise UserError(
                f"method.latent_reward {c.latent_reward} scores latents of another autoencoder than "
                f"{generator.name_or_path}; train one with `mmalign train-reward` and model: {generator.name_or_path}"
            )

    def describe(self) -> str:
        """Return the conventions of SPO and the noise level of the latent reward."""
        level = "its own level" if self.config.fidelity == "paper" else "the level of the step before"
        return f"{super().describe()}, latent reward at {level}"

    def step_scores(self, run: Run, samples: PromptBatch, step: Branching) -> Float[Tensor, "candidates batch"]:
        """Return the latent reward of each candidate."""
        level = step.t if self.config.fidelity == "code" else step.t_next
        scores = [self._score(run, candidate, float(level), samples) for candidate in step.candidates]
        return torch.stack(scores)

    def final_rewards(
        self, run: Run, samples: PromptBatch, latents: Float[Tensor, "batch *latent"]
    ) -> Float[Tensor, " batch"]:
        """Return the latent reward of finished samples; they are decoded only where the recipe has rewards."""
        if run.score.rewards:
            return super().final_rewards(run, samples, latents)
        run.cost.add(images_sampled=len(latents))
        return self._score(run, latents, 0, samples)

    def _score(self, run: Run, latents: Tensor, level: float, samples: PromptBatch) -> Float[Tensor, " batch"]:
        scores = self.reward.score_latents(latents, max(int(level), 0), samples.prompts)
        if not bool(scores.isfinite().all()):
            raise TrainingDiverged(
                f"after step {run.step} the latent reward of the samples is not finite; lower trainer.learning_rate, "
                "and run the same command again: it goes on from the last checkpoint"
            )
        # Half a network, called with and without the prompt, costs as much as one image.
        run.cost.add(images_seen=len(latents), reward_calls=len(latents))
        return scores
