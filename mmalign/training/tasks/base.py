"""What differs between kinds of models while they are trained: one `Task` a modality.

A run asks its task, never the modality: how data are opened and encoded, how the model is loaded and evaluated, what
its export is called, and how a user loads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from mmalign.config.run import RunConfig
from mmalign.data.sampler import BatchSampler, Samples
from mmalign.methods.base import Method
from mmalign.methods.reference import Reference
from mmalign.methods.run import BaseRun
from mmalign.training.evaluation import Evaluator
from pipelines import Generator, VisionLanguageModel

ModelT = TypeVar("ModelT", bound="Generator | VisionLanguageModel")


class Probe(Protocol):
    """One input of a model, by which an exported model is compared with the trained one."""

    def predict(self, model: Any) -> Tensor:
        """Return the model's output for the input, on the CPU in float32, dropout off."""
        ...


class Source(Protocol):
    """What is learned from, read but not encoded: a table of pairs or labels, or a list of prompts."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...


@dataclass(frozen=True)
class CardFacts:
    """What a model card says of every model of a kind."""

    library: str
    pipeline_tag: str
    all_weights: str
    evaluation: str


class Task(ABC, Generic[ModelT]):
    """Training one kind of model."""

    unit: ClassVar[str]
    """What progress and speed are counted in."""
    card: ClassVar[CardFacts]

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Raise a UserError for an evaluation that cannot be done; nothing is loaded."""

    @abstractmethod
    def open_source(self, config: RunConfig, method: Method[Any]) -> Source:
        """Return what is learned from, read but not encoded; prints what was kept and left out."""

    @abstractmethod
    def load_model(self, config: RunConfig, path: str, device: Any) -> ModelT:
        """Return the model, or base and adapter, at a path or Hub id, in float32."""

    @abstractmethod
    def model_id(self, model: ModelT) -> str:
        """Return what identifies a whole model by its content, without an adapter."""

    def check_model(self, method: Method[Any], model: ModelT) -> None:
        """Raise a UserError where the method's options do not fit the model."""

    @abstractmethod
    def encode(
        self, source: Any, model: ModelT, config: RunConfig, accelerator: Any, model_id: str
    ) -> tuple[Samples, str]:
        """Return what is learned from, encoded, and an identifier of its content.

        Of several processes the first encodes, and the others read what it wrote.
        """

    @abstractmethod
    def evaluator(self, config: RunConfig, model: ModelT) -> Evaluator | None:
        """Return what evaluates the model while it is trained, if anything is to."""

    def free_encoders(self, model: ModelT, method: Method[Any]) -> tuple[str, ...]:
        """Drop what only encoding needed, and return the names of the encoders that stay in memory."""
        return ()

    @abstractmethod
    def set_mode(self, model: ModelT) -> None:
        """Switch the network to the mode that it is trained in."""

    @abstractmethod
    def make_run(self, model: ModelT, **parts: Any) -> BaseRun[ModelT]:
        """Return the view of the run that the method is given; `parts` are those of `BaseRun`."""

    @abstractmethod
    def counted(self, model: ModelT, reference: Reference | None) -> list[nn.Module]:
        """Return the networks whose forward and backward passes count as cost."""

    @abstractmethod
    def probe(self, run: BaseRun[ModelT], sampler: BatchSampler) -> Probe:
        """Return an input to compare the export with the trained model by."""

    @abstractmethod
    def usage(self, base: str, output: Path, *, lora: bool) -> Sequence[str]:
        """Return the lines of Python that load the export as a user would."""
