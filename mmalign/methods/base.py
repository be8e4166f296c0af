"""The interface of methods: the configuration, the declared needs, and the loss of a batch.

A method is one file: a `Config`, the `needs`, and `loss(run, batch)`. Data order, precision, accumulation, the
reference, checkpoints and logging belong to `mmalign.training.loop`; formulas of papers belong to `mmalign.losses`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from jaxtyping import Float
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    model_serializer,
    model_validator,
)
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.batches import LabelBatch, PairBatch, PromptBatch
from mmalign.losses.pair_loss import LossType
from pipelines.noise import NoiseProcess

__all__ = ["LabelBatch", "LossOutput", "Method", "MethodConfig", "Needs", "PairBatch", "PromptBatch", "TimestepRange"]


@dataclass(frozen=True)
class Needs:
    """What a method needs; checked against the recipe before any weight is loaded.

    `source`: preference pairs, single images with labels, good images alone (those of labels, or the chosen ones of
    pairs), or prompts alone (the method samples its own images);
    `reference`: whether the reference model is evaluated; `reward`: whether samples are scored, and whether
    the score must have a gradient ("optional": rewards are only logged, if any are given); `flow` and `video`: whether
    it trains flow-matching models, and generators of videos, too.
    """

    source: Literal["pairs", "labels", "images", "prompts"]
    reference: bool = False
    reward: Literal["none", "optional", "blackbox", "differentiable"] = "none"
    modality: Literal["image", "video", "vlm"] = "image"
    flow: bool = True
    video: bool = True


@dataclass
class LossOutput:
    """The scalar to minimise, and further scalars to log (tensors are read only when a log line is written)."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


class MethodConfig(BaseModel):
    """Base of every method's configuration: unknown keys are errors, values do not change once read.

    A key that gets another name is declared in `renamed`, old name -> new name; the old one is then still read.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    refused: ClassVar[Mapping[str, str]] = {
        "two_pass": "not supported: the loss of this method is not computed from one output a sample; remove it"
    }
    """Options of other methods that this one cannot have, and why; a declared option is never refused."""
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TwoPassConfig(MethodConfig):
    """Base of configurations of methods whose loss reaches the policy by `Run.predict` alone."""

    two_pass: bool | None = None
    """the exact gradient sample by sample, with the activations of one sample in memory and one more forward pass for
    each (see `mmalign.methods.two_pass`); null: on for videos, off for images"""

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "two_pass" or value is not None}


class PairLossConfig(MethodConfig):
    """Base of configurations whose loss of a pair is `mmalign.losses.pair_loss`."""

    loss_type: LossType = "sigmoid"
    """sigmoid: DPO; robust: unbiased under wrong labels; ipo: regression to a margin; hinge: flat beyond logit 1"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """assumed probability that a label is wrong"""

    @model_validator(mode="after")
    def _robust_needs_a_rate(self) -> PairLossConfig:
        if self.loss_type == "robust" and not self.label_smoothing:
            raise ValueError(
                "loss_type robust corrects for label_smoothing, the share of wrong labels, which is 0; "
                "give it, such as 0.1, or take loss_type sigmoid"
            )
        return self


class TimestepRange(TwoPassConfig):
    """Base of configurations that train on a part of the noise schedule, `timesteps: [low, high]`; 0 is clean."""

    timesteps: tuple[StrictInt, StrictInt] | tuple[float, float] = (0.0, 1.0)
    """noise levels to train on, [low, high): fractions of the schedule as [0.5, 1.0], or integers as [500, 1000]"""

    @model_validator(mode="after")
    def _check_timesteps(self) -> TimestepRange:
        low, high = self.timesteps
        if isinstance(low, float) and not (0 <= low < high <= 1):
            raise ValueError(f"timesteps [{low}, {high}]: fractions must satisfy 0 <= low < high <= 1")
        if isinstance(low, int) and not 0 <= low < high:
            raise ValueError(f"timesteps [{low}, {high}]: integers must satisfy 0 <= low < high")
        if isinstance(high, int) and high == 1:
            raise ValueError("timesteps [0, 1] could mean all or step 0 alone; write [0.0, 1.0] for all")
        return self

    def timestep_bounds(self, num_train_timesteps: int) -> tuple[int, int]:
        """Return (low, high), high excluded, as integers on a schedule of that many steps.

        Raises:
            UserError: the range holds no timestep, or ends after the schedule does.
        """
        low, high = self.timesteps
        if isinstance(low, float):
            low, high = round(low * num_train_timesteps), round(high * num_train_timesteps)
        if not low < high <= num_train_timesteps:
            raise UserError(
                f"method.timesteps {list(self.timesteps)} means [{low}, {high}) on a schedule of "
                f"{num_train_timesteps} steps; it must hold at least one step and not pass the end"
            )
        return int(low), int(high)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


class Method(ABC, Generic[ConfigT]):
    """A fine-tuning method. Subclasses set the class attributes and `loss`; online methods also `collect`.

    `run` is the method's view of the run: `mmalign.run.Run` for image generators, `mmalign.run.VlmRun` for
    vision-language models.
    """

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]] = MethodConfig
    needs: ClassVar[Needs]
    images_per_sample: int = 1
    """Images that the policy denoises per sample of the data (2 for a pair): the unit of the reported speed."""
    updates_per_round: int = 1
    """Optimiser steps on the result of one `collect`."""
    rounds_vary: bool = False
    """Whether the samples decide how many optimiser steps a round has; `updates_per_round` is then the least."""
    weighs_pairs: ClassVar[bool] = False
    """Whether the loss takes the weights of pairs, and compares labelled segments of videos apart."""
    stages: Sequence[int] = ()
    """Difficulties of pairs that are trained on one after another; each stage starts where the previous one ended."""

    def __init__(self, config: ConfigT) -> None:
        """Keep the validated configuration."""
        self.config = config

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference model is kept while training, instead of precomputing its values."""
        return self.needs.reference

    def check(self, process: NoiseProcess) -> None:
        """Raise a UserError for a configuration that does not fit the model's noise process; called before encoding.

        By default that is a range of timesteps outside the schedule.
        """
        if isinstance(self.config, TimestepRange):
            self.config.timestep_bounds(process.num_train_timesteps)

    def check_data(self, source: Any) -> None:
        """Raise a UserError for data without the columns that the method learns from; by default there are none.

        `source` is the data that the recipe names, read but not encoded, such as a `PairTable`. Called before any
        weight is read.
        """

    def begin(self, run: Any) -> None:
        """Load further models of the method, such as a latent reward, once the run is ready; by default none.

        Raise a UserError if they do not fit the policy.
        """

    def describe(self) -> str:
        """Return the conventions in one line, printed before training, such as what beta multiplies."""
        return self.name

    def collect(self, run: Any, batches: Iterable[Any]) -> Iterable[Any]:
        """Turn the micro-batches sampled for one round into the batches of its updates; by default they are the same.

        A method that learns from its own samples generates and scores them here.
        """
        return batches

    def split(self, run: Any, collected: Iterable[Any]) -> Sequence[Iterable[Any]]:
        """Divide a round into the batches of its optimiser steps; at least one step.

        By default there are `updates_per_round` steps, and each learns from the whole round.
        """
        if self.updates_per_round == 1:
            return [collected]
        held = list(collected)
        return [held] * self.updates_per_round

    @abstractmethod
    def loss(self, run: Any, batch: Any) -> LossOutput:
        """Return the mean loss of a batch, with its graph, and the metrics to log."""

    def learn(self, run: Any, batch: Any, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Add the gradient of a batch's loss and return its metrics; in parts if one graph would be too large."""
        output = self.loss(run, batch)
        backward(output.loss)
        return {"loss": output.loss, **output.metrics}

    def after_update(self, run: Any) -> None:
        """Act after an optimiser step, such as on an average of the weights; `run.step` is still the step's number."""

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state between rounds, as JSON values; saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors of the method between rounds, such as an earlier policy; saved with every checkpoint."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
