"""The differences between kinds of models in training: one `Task` a modality.

A task opens and encodes the data, loads and evaluates the model, and names its export and how a user loads it.
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
    """Training data, read but not encoded: a table of pairs or labels, or a list of prompts."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...


@dataclass(frozen=True)
class CardFacts:
    """Texts of the model card of a kind of model."""

    library: str
    pipeline_tag: str
    all_weights: str
    evaluation: str


class Task(ABC, Generic[ModelT]):
    """Training one kind of model."""

    unit: ClassVar[str]
    """The unit of progress and speed."""
    card: ClassVar[CardFacts]

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Raise a UserError for an evaluation that cannot be done; nothing is loaded."""

    @abstractmethod
    def open_source(self, config: RunConfig, method: Method[Any]) -> Source:
        """Return the training data, read but not encoded; prints counts of kept and left-out samples."""

    @abstractmethod
    def load_model(self, config: RunConfig, path: str, device: Any) -> ModelT:
        """Return the model, or base and adapter, at a path or Hub id, in float32."""

    @abstractmethod
    def model_id(self, model: ModelT) -> str:
        """Return a fingerprint of a whole model's content, without an adapter."""

    def check_model(self, method: Method[Any], model: ModelT) -> None:
        """Raise a UserError where the method's options do not fit the model."""

    @abstractmethod
    def encode(
        self, source: Any, model: ModelT, config: RunConfig, accelerator: Any, model_id: str
    ) -> tuple[Samples, str]:
        """Return the encoded training data, and an identifier of their content.

        Of several processes the first encodes, and the others read its files.
        """

    @abstractmethod
    def evaluator(self, config: RunConfig, model: ModelT) -> Evaluator | None:
        """Return the evaluator for training, if one is configured."""

    def free_encoders(self, model: ModelT, method: Method[Any]) -> tuple[str, ...]:
        """Drop the encoders that training does not need, and return the names of those that stay in memory."""
        return ()

    @abstractmethod
    def set_mode(self, model: ModelT) -> None:
        """Switch the network to its mode for training."""

    @abstractmethod
    def make_run(self, model: ModelT, **parts: Any) -> BaseRun[ModelT]:
        """Return the method's view of the run; `parts` are those of `BaseRun`."""

    @abstractmethod
    def counted(self, model: ModelT, reference: Reference | None) -> list[nn.Module]:
        """Return the networks whose forward and backward passes count as cost."""

    @abstractmethod
    def probe(self, run: BaseRun[ModelT], sampler: BatchSampler) -> Probe:
        """Return an input to compare the export with the trained model by."""

    def pipeline_tag(self, base: str) -> str:
        """Return the Hub's name for what models trained from a base do."""
        return self.card.pipeline_tag

    @abstractmethod
    def usage(self, base: str, output: Path, *, lora: bool) -> Sequence[str]:
        """Return the lines of Python that load the export as a user would."""
