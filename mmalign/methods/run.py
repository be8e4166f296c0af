"""A method's view of a training run: the model, its reference, and random draws that depend only on the sample."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mmalign.core.cost import Cost
from mmalign.core.errors import TrainingDiverged
from mmalign.core.seeds import derive_seed
from mmalign.data.batches import LabelBatch, PairBatch
from mmalign.methods.reference import Reference, TokenValues
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.live import LiveRewards
from pipelines import Generator, NoiseProcess, VisionLanguageModel, seeded_noise
from pipelines.conditioning import Conditioning
from pipelines.vlm.batch import VlmBatch
from rewards.combining.on_frames import evenly

ModelT = TypeVar("ModelT", bound="Generator | VisionLanguageModel")
Autocast = Callable[[], AbstractContextManager[Any]]
WATCHED = 4
"""Samples a batch for measuring the distance to the reference where it is only logged."""


class BaseRun(Generic[ModelT]):
    """The part of a method's view of a run that is common to all kinds of models.

    Attributes: `model`, the policy; `reference`; `score`, the rewards; `cost`; `seed`; `step`, the number of optimiser
    steps done so far; `shown`, the images that the method made last; `viewers`, called with all that it makes; `kept`,
    the encoders that stay in memory because the method decodes; `samples`, what is learned from, encoded.
    """

    def __init__(
        self,
        model: ModelT,
        *,
        seed: int = 0,
        reference: Reference | None = None,
        rewards: Sequence[WeightedReward] = (),
        autocast: Autocast = nullcontext,
        kept: Collection[str] = (),
        samples: Any = (),
    ) -> None:
        """Bring the parts together; `autocast` makes the context in which the network is called."""
        self.model = model
        self.samples = samples
        self.seed = seed
        self.cost = Cost()
        self.score = LiveRewards(rewards, self.cost)
        self.autocast = autocast
        self.kept = kept
        self.step = 0
        self.shown: tuple[Tensor, list[str]] | None = None
        self.viewers: list[Callable[[Tensor, list[str]], None]] = []
        self._reference = reference

    @property
    def generator(self) -> ModelT:
        """The policy, by the name that methods of image generators use."""
        return self.model

    @property
    def reference(self) -> Reference:
        """The reference model: the model before training, frozen.

        Raises:
            RuntimeError: the method did not declare that it needs one, so none was kept.
        """
        if self._reference is None:
            raise RuntimeError("this method has no reference; declare it: `needs = Needs(..., reference=True)`")
        return self._reference

    def seeds(self, ids: Sequence[str], epoch: int, purpose: str = "sample") -> list[int]:
        """Return one seed for each sample, derived from (seed, purpose, id, epoch)."""
        return [derive_seed(self.seed, purpose, sample_id, epoch) for sample_id in ids]

    def random(self, *parts: int | str) -> torch.Generator:
        """Return a CPU generator for the draws of a whole batch or step, seeded from (seed, parts)."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *parts))

    def noise_like(
        self, x: Float[Tensor, "batch *latent"], ids: Sequence[str], epoch: int, purpose: str = "noise"
    ) -> Float[Tensor, "batch *latent"]:
        """Return standard normal noise, seeded for each sample from (seed, purpose, id, epoch).

        Each sample has its own generator on the CPU, so that its noise is the same on every device, in any batch, on
        any rank and after a resume.
        """
        return seeded_noise(self.seeds(ids, epoch, purpose), x.shape[1:], device=x.device)


class Run(BaseRun[Generator]):
    """The view of a generator's run that is handed to `Method.loss` and `Method.collect`; see `BaseRun`."""

    @property
    def process(self) -> NoiseProcess:
        """The policy's noise process."""
        return self.model.process

    def predict(
        self, x_t: Float[Tensor, "batch *latent"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch *latent"]:
        """Return the policy's output, with its graph, in the run's precision; the result is float32."""
        # Autocast ends with each call: its cache of cast weights must not outlive a reference call, whose casts have
        # no graph.
        with self.autocast():
            return self.generator.predict(x_t, t, cond).float()

    def decode(
        self, latents: Float[Tensor, "batch *latent"], *, checkpoint: bool = False, frames: int | None = None
    ) -> Float[Tensor, "batch *media"]:
        """Decode latents that the policy has sampled to images or videos, or to some frames of the latter.

        `frames` is a number of latent frames, spread evenly: `Generator.decode_frames`.

        Raises:
            TrainingDiverged: a latent is not finite.
        """
        if not bool(latents.detach().isfinite().all()):
            raise TrainingDiverged(
                f"after step {self.step} the model samples what is not finite; lower trainer.learning_rate, or use "
                "trainer.precision bf16 or fp32, and run the same command again: it goes on from the last checkpoint"
            )
        if frames is not None:
            return self.generator.decode_frames(latents, evenly(latents.shape[2], frames))
        media: Tensor = self.generator.decode_checkpointed(latents) if checkpoint else self.generator.decode(latents)
        return media

    def show(self, images: Float[Tensor, "batch *media"], prompts: Sequence[str]) -> None:
        """Hand images or videos in [0, 1] that the method sampled to the monitors, and count them."""
        held = images.detach()
        self.shown = (held if held.ndim == 4 else held.cpu(), list(prompts))  # videos are too large to wait on a GPU
        for viewer in self.viewers:
            viewer(*self.shown)
        self.cost.add(images_sampled=len(images))

    def timesteps(
        self, batch: PairBatch | LabelBatch, low: int = 0, high: int | None = None, *, discount: float = 1.0
    ) -> Shaped[Tensor, " batch"]:
        """Return one training timestep for each sample in [low, high), seeded from (seed, id, epoch).

        `discount` is that of `NoiseProcess.sample_timesteps`.
        """
        source = torch.Generator()
        drawn = []
        for seed in self.seeds(batch.ids, batch.epoch, "timestep"):
            source.manual_seed(seed)
            drawn.append(self.process.sample_timesteps(1, generator=source, low=low, high=high, discount=discount))
        return torch.cat(drawn).to(batch.cond.prompt_embeds.device)


class VlmRun(BaseRun[VisionLanguageModel]):
    """The view of a vision-language model's run that is handed to `Method.loss`; see `BaseRun`."""

    def log_probs(self, batch: VlmBatch) -> TokenValues:
        """Return the policy's log-probability of every completion token, with its graph, and the mask of tokens.

        See `VisionLanguageModel.log_probs`.
        """
        with self.autocast():
            found: TokenValues = self.model.log_probs(batch)
            return found

    def logits(self, batch: VlmBatch) -> Float[Tensor, "batch tokens vocabulary"]:
        """Return the logits from which the policy predicts every completion token, with their graph."""
        with self.autocast():
            found: Tensor = self.model.completion_logits(batch)
            return found
