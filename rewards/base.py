"""The base class of all rewards: facts on the class, checked input, frozen weights, micro-batches.

A reward maps media, and whatever else it declares to need, to one float32 number per sample. A subclass states its
facts as class attributes and implements `score`; this class does the rest, so that all rewards behave alike:

* media, prompts and references are validated, moved to the reward's device and split into micro-batches (halved when
  the device runs out of memory);
* it runs in inference mode unless a gradient is asked for (media that require one, with gradients enabled); only
  a differentiable reward gives one, to the media and never to its own weights;
* a surrounding autocast has no effect: a score depends only on the reward's own dtype.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.weights import Weights
from rewards.errors import RewardError, choices
from rewards.media import SHAPES, Media, check_tensor, read_media

NEEDS = ("prompts", "references")
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """The facts of a reward, known without loading it.

    `source`: where the weights come from, in words; `files`: the published files themselves.
    """

    name: str
    summary: str
    version: str
    modality: str
    differentiable: bool
    needs: tuple[str, ...]
    range: tuple[float, float]
    higher_is_better: bool
    derived_from: tuple[str, ...]
    batch_invariant: bool
    grouped: bool
    licence: str
    source: str
    citation: str
    files: tuple[Weights, ...]

    @classmethod
    def of(cls, reward: Reward | type[Reward]) -> Facts:
        """Collect the facts of a reward, or of its class before any option is chosen."""
        described = reward if isinstance(reward, type) else type(reward)
        own = {field: getattr(reward, field) for field in cls.__dataclass_fields__ if field != "summary"}
        own |= {field: tuple(sorted(own[field])) for field in ("needs", "derived_from")}
        return cls(summary=(described.__doc__ or "").strip().split("\n")[0], **own)


class Reward(nn.Module, ABC):
    """Score media; subclasses set the facts below and implement `score`.

    `range` holds the bounds of the score (infinite where there are none); `version` belongs to the metric's name
    if scores of different versions are not comparable; `derived_from` names rewards that this one is a function of: a
    model trained on those counts as trained on this; `batch_invariant=False` (a score depends on the rest of the
    batch) switches micro-batches off; `grouped`: of that, it depends on the other images of its prompt alone;
    `fixed_size` is the side in pixels where images of no other size are read, `least_frames` how many frames a video
    must have. `batch_size` is the micro-batch.
    `device` defaults to CUDA where there is one.
    """

    name: ClassVar[str] = ""
    version: str = "1"
    modality: str = "image"
    differentiable: bool = False
    needs: frozenset[str] = frozenset()
    range: tuple[float, float] = (float("-inf"), float("inf"))
    higher_is_better: bool = True
    derived_from: frozenset[str] = frozenset()
    batch_invariant: bool = True
    grouped: bool = False
    licence: str = ""
    source: str = "none: computed"
    citation: str = ""
    files: tuple[Weights, ...] = ()
    fixed_size: ClassVar[int | None] = None
    least_frames: ClassVar[int] = 1

    def __init__(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 32,
    ) -> None:
        """Set the device and dtype of the reward; subclasses pass these options on."""
        super().__init__()
        if batch_size < 1:
            raise RewardError(f"batch_size is {batch_size}; at least 1 is allowed")
        self.batch_size = batch_size
        self.training = False
        # Follows .to(), .double(), ... and so gives device and dtype even if there are no weights.
        self.register_buffer("_anchor", torch.empty(0, dtype=_as_dtype(dtype), device=_as_device(device)), False)
        self._anchor: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        """Check the facts when a subclass is defined."""
        super().__init_subclass__(**options)
        cls.needs = frozenset(cls.needs)
        for need in sorted(cls.needs - set(NEEDS)):
            raise RewardError(f"{cls.__name__}.needs has {need!r}; {choices(need, NEEDS)}")
        if cls.modality not in SHAPES:
            raise RewardError(f"{cls.__name__}.modality is {cls.modality!r}; {choices(cls.modality, SHAPES)}")

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        """Raise `RewardError` for prompts that this reward cannot score; called before images are generated for them.

        By default all prompts are allowed.
        """

    @abstractmethod
    def score(
        self,
        media: Float[Tensor, " batch *shape"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Score one micro-batch, already validated and on the reward's device.

        media: `[B, 3, H, W]` (`[B, F, 3, H, W]` for videos) in [0, 1], float32 or float64; prompts: B strings or None;
        references: B tensors `[R, 3, H, W]`, each the references of one sample, or what `prepare_references` made of
        them, or None.
        """

    def prepare_references(self, references: list[Tensor]) -> list[Tensor]:
        """Preprocess the validated references of a whole call for `score`; by default they stay as they are.

        A subclass embeds references here once, instead of in every micro-batch. No gradient is kept.
        """
        return references

    def forward(
        self,
        media: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Score media against prompts and references, sample by sample: `[B]` float32 on the device of the media.

        media: tensor `[B, 3, H, W]` (`[B, F, 3, H, W]` for videos) in [0, 1], or a list of such tensors without the
        batch dimension, PIL images and paths, sizes mixed as they come. prompts: B strings. references: for each
        of the B samples a tensor `[R, 3, H, W]`. Raises `RewardError` on anything else, and when a gradient is asked
        of a reward that has none.
        """
        groups = read_media(media, self.modality)
        count = sum(len(positions) for positions, _ in groups)
        prompts = self._check_prompts(prompts, count)
        references = self._check_references(references, count)
        if references is not None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                references = self.prepare_references(references)

        def score(chunk: Tensor, positions: list[int]) -> Tensor:
            scores = self.score(
                chunk,
                None if prompts is None else [prompts[i] for i in positions],
                None if references is None else [references[i].to(self.device) for i in positions],
            )
            if not isinstance(scores, Tensor) or scores.shape != (len(positions),):
                got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise RewardError(f"{type(self).__name__}.score returned {got} instead of a tensor [{len(positions)}]")
            return scores

        return self._run(groups, score)

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every medium against every prompt: `[B, P]` float32; rewards with embeddings compute each once."""
        self._check_matrix(prompts)
        groups = read_media(media, self.modality)

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            return torch.stack([self.score(chunk, [prompt] * len(chunk), None) for prompt in prompts], dim=1)

        return self._run(groups, row)

    def pairwise(
        self,
        first: Media,
        second: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return by how much the first of each pair is better than the second: `[B]`, positive where it is better."""
        difference = self(first, prompts=prompts, references=references) - self(
            second, prompts=prompts, references=references
        )
        return difference if self.higher_is_better else -difference

    @property
    def device(self) -> torch.device:
        """The device of the reward."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._anchor.dtype

    @property
    def facts(self) -> Facts:
        """The facts of this reward with its options."""
        return Facts.of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Freeze every assigned module and parameter, because rewards are never trained."""
        if isinstance(value, nn.Module):
            value.eval().requires_grad_(False)
        elif isinstance(value, nn.Parameter):
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Reward:
        """Stay in evaluation mode, because dropout would make scores random."""
        return super().train(False)

    def _run(self, groups: list[tuple[list[int], Tensor]], function: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
        """Apply `function(chunk, positions)` to micro-batches and return the rows in the order of the media."""
        gradient = torch.is_grad_enabled() and any(media.requires_grad for _, media in groups)
        if gradient and not self.differentiable:
            raise RewardError(f"{self.name or type(self).__name__} is not differentiable; give it media.detach()")
        rows, order = [], []
        mode = contextlib.nullcontext() if gradient else torch.inference_mode()
        with mode, torch.autocast(self.device.type, enabled=False):
            for positions, media in groups:
                rows += self._in_micro_batches(media, positions, function, gradient)
                order += positions
        # The clone, made outside inference mode, is a tensor that a loss may use.
        result = torch.cat(rows).to(groups[0][1].device, torch.float32).clone()
        return result if order == sorted(order) else result[torch.tensor(order, device=result.device).argsort()]

    def _in_micro_batches(
        self, media: Tensor, positions: list[int], function: Callable[[Tensor, list[int]], Tensor], gradient: bool
    ) -> list[Tensor]:
        rows: list[Tensor] = []
        start = 0
        while start < len(positions):
            stop = start + self.batch_size if self.batch_invariant else len(positions)
            chunk = media[start:stop]
            # Half precision rounds 8-bit levels, so pixels are handled in at least float32.
            chunk = chunk.to(self.device, torch.promote_types(chunk.dtype, torch.float32))
            try:
                rows.append(function(chunk, positions[start:stop]))
                start = stop
                continue
            except torch.OutOfMemoryError:
                # With gradients the graph keeps all micro-batches in memory, so that smaller ones would not help.
                if gradient or len(chunk) == 1 or not self.batch_invariant:
                    raise
            # Outside the handler, because its traceback would keep the tensors of the failed call in memory.
            self.batch_size = len(chunk) // 2
            warnings.warn(f"{self.name}: out of memory; the micro-batch size is now {self.batch_size}", stacklevel=4)
            torch.cuda.empty_cache()
        return rows

    def _check_prompts(self, prompts: Sequence[str] | None, count: int) -> list[str] | None:
        if prompts is None:
            if "prompts" in self.needs:
                raise RewardError(f"{self.name} needs prompts: reward(media, prompts=[...]), one for each of {count}")
            return None
        check_strings(prompts)
        if len(prompts) != count:
            raise RewardError(f"{len(prompts)} prompts for {count} media; give one each (matrix() takes all pairs)")
        return list(prompts)

    def _check_references(self, references: Sequence[Tensor] | Tensor | None, count: int) -> list[Tensor] | None:
        if references is None:
            if "references" in self.needs:
                raise RewardError(f"{self.name} needs references: one tensor [R, 3, H, W] for each of {count} media")
            return None
        if len(references) != count:
            raise RewardError(f"{len(references)} sets of references for {count} media; give one set each")
        check_references(references)
        return list(references)

    def _check_matrix(self, prompts: Sequence[str]) -> None:
        if self.needs != {"prompts"}:
            needs = ", ".join(sorted(self.needs)) or "nothing but media"
            raise RewardError(
                f"{self.name} needs {needs}; matrix() supports only rewards that need nothing but prompts"
            )
        check_strings(prompts)
        if not prompts:
            raise RewardError("prompts is empty; matrix() needs at least one")


def check_references(references: Iterable[Any]) -> None:
    """Raise `RewardError` unless every set of references is a tensor `[R, 3, H, W]` in [0, 1]."""
    for position, reference in enumerate(references):
        if not isinstance(reference, Tensor):
            raise RewardError(f"references[{position}] is a {type(reference).__name__}; a tensor is expected")
        check_tensor(reference, "image", f"references[{position}]")


def check_strings(prompts: Iterable[Any]) -> None:
    """Raise `RewardError` unless the prompts are a list of strings; a single string would be read as letters."""
    if isinstance(prompts, str):
        raise RewardError("prompts is one string; give a list with one prompt for each medium")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise RewardError(f"prompts[{position}] is a {type(prompt).__name__}; a string is expected")


def _as_device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in _DTYPES:
        raise RewardError(f"dtype {dtype!r} is unknown; {choices(dtype, _DTYPES)}")
    return _DTYPES[dtype or "float32"]
