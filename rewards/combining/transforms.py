"""Transforms of one reward's scores, by name and options, as `combine` takes them for its parts.

| name | what it does | options |
|---|---|---|
| `log-sigmoid` | LSC, `log sigmoid(score - level)` | `references`, or `mean` and `std`; `z` (85th percentile) |
| `par` | mean of `sigmoid(score - reference)` | `references` |
| `sigmoid`, `log` | the function | none |
| `running-zscore` | by mean and deviation of all scores so far | `per` (`all`, `prompt`), those of `RunningStats` |
| `group-zscore` | within the samples of one prompt in the batch | `eps`, `unbiased` |

`references` are scores of the reference policy: a list of numbers for all prompts, or for each prompt its own list, as
a mapping or the path of a JSON file with one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.combining.shaping import Z85, RunningStats, group_zscore, log_sigmoid_centred, par, reference_level
from rewards.errors import RewardError, choices

Bounds = tuple[float, float]
Scores = Sequence[float] | Mapping[str, Sequence[float]] | str | PathLike[str]
ANY = (float("-inf"), float("inf"))


class Transform(nn.Module):
    """Map scores to scores; a combination inherits `batch_invariant` and `needs_prompts`.

    `described` identifies it in the version of a combination.
    """

    batch_invariant = True
    needs_prompts = False
    described = ""

    @abstractmethod
    def shape(
        self, scores: Float[Tensor, " batch"], prompts: Sequence[str] | None, learn: bool
    ) -> Float[Tensor, " batch"]:
        """Transform scores; `learn=False` leaves running statistics as they are."""

    @abstractmethod
    def bounds(self, low: float, high: float) -> Bounds:
        """Return the bounds of the transformed scores, from the bounds of the scores."""


class LogSigmoid(Transform):
    """LSC against the level of the reference policy (`rewards.combining.shaping.log_sigmoid_centred`)."""

    def __init__(
        self,
        *,
        references: Scores | None = None,
        mean: float | None = None,
        std: float | None = None,
        z: float = Z85,
    ) -> None:
        """Compute the level, or that of each prompt."""
        super().__init__()
        self.levels: Tensor | dict[str, Tensor]
        if references is not None and mean is None and std is None:
            given = read_references(references)
            self.levels = (
                {prompt: reference_level(scores, z) for prompt, scores in given.items()}
                if isinstance(given, dict)
                else reference_level(given, z)
            )
        elif references is None and mean is not None and std is not None:
            self.levels = torch.tensor(mean + z * std, dtype=torch.float64)
        else:
            raise RewardError("log-sigmoid needs either references, or mean and std, of the reference policy's scores")
        self.needs_prompts = isinstance(self.levels, dict)

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Centre on the level of all, or of each sample's prompt."""
        return log_sigmoid_centred(scores, _chosen(self.levels, prompts, scores))

    def bounds(self, low: float, high: float) -> Bounds:
        """At most 0."""
        return float("-inf"), 0.0


class Par(Transform):
    """PAR against reference scores (`rewards.combining.shaping.par`)."""

    def __init__(self, *, references: Scores) -> None:
        """Read the references."""
        super().__init__()
        self.references = read_references(references)
        self.needs_prompts = isinstance(self.references, dict)

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Compare each score with all references, or with those of its prompt."""
        if not isinstance(self.references, dict):
            return par(scores, self.references.to(scores))
        rows = [_found(self.references, prompt).to(scores) for prompt in prompts or ()]
        return torch.cat([par(score[None], row) for score, row in zip(scores, rows, strict=True)])

    def bounds(self, low: float, high: float) -> Bounds:
        """A probability."""
        return 0.0, 1.0


class Sigmoid(Transform):
    """The logistic function."""

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Apply the logistic function."""
        return torch.sigmoid(scores)

    def bounds(self, low: float, high: float) -> Bounds:
        """A probability."""
        return 0.0, 1.0


class Log(Transform):
    """The logarithm, for a reward that is a probability: a sum of logarithms is that of the joint probability."""

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Take the logarithm of positive scores."""
        if (scores <= 0).any():
            raise RewardError(f"log of a score of {scores.min().item():.4g}; scores above 0 are needed")
        return scores.log()

    def bounds(self, low: float, high: float) -> Bounds:
        """Without a lower bound where the score has none above 0."""
        values = torch.tensor([max(low, 0.0), max(high, 0.0)], dtype=torch.float64).log().tolist()
        return values[0], values[1]


class RunningZScore(Transform):
    """Normalise by the scores seen so far (`rewards.combining.shaping.RunningStats`)."""

    batch_invariant = False

    def __init__(self, *, per: str = "all", **options: Any) -> None:
        """`per`: one set of statistics for `all` prompts, or one for each `prompt`."""
        super().__init__()
        if per not in ("all", "prompt"):
            raise RewardError(f"running-zscore: per is {per!r}; {choices(per, ('all', 'prompt'))}")
        self.needs_prompts = per == "prompt"
        self.stats = RunningStats(**options)
        self.batch_invariant = self.stats.frozen

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Update and normalise, or only normalise."""
        keys = prompts if self.needs_prompts else None
        return self.stats(scores, keys) if learn else self.stats.normalise(scores, keys)

    def bounds(self, low: float, high: float) -> Bounds:
        """Unbounded, because the deviation may be small."""
        return ANY


class GroupZScore(Transform):
    """Normalise among the samples of one prompt (`rewards.combining.shaping.group_zscore`)."""

    batch_invariant = False
    needs_prompts = True

    def __init__(self, *, eps: float = 1e-4, unbiased: bool = False) -> None:
        """Take the options of `group_zscore`."""
        super().__init__()
        self.eps, self.unbiased = eps, unbiased

    def shape(self, scores: Tensor, prompts: Sequence[str] | None, learn: bool) -> Tensor:
        """Normalise; the prompt is the group."""
        return group_zscore(scores, list(prompts or ()), self.eps, self.unbiased)

    def bounds(self, low: float, high: float) -> Bounds:
        """Unbounded, because a group may be large."""
        return ANY


TRANSFORMS: dict[str, type[Transform]] = {
    "log-sigmoid": LogSigmoid,
    "par": Par,
    "sigmoid": Sigmoid,
    "log": Log,
    "running-zscore": RunningZScore,
    "group-zscore": GroupZScore,
}


def make_transform(spec: str | Mapping[str, Any] | Transform, label: str) -> Transform:
    """Make a transform from its name, or from `{name: ..., option: ...}`; `label` is its part."""
    if isinstance(spec, Transform):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in TRANSFORMS:
        raise RewardError(f"part {label!r}: transform {name!r} is unknown; {choices(str(name), TRANSFORMS)}")
    found = TRANSFORMS[name]
    allowed = _options(found)
    for option in options:
        if option not in allowed:
            raise RewardError(f"part {label!r}: {name} has no option {option!r}; {choices(option, allowed)}")
    try:
        made = found(**options)
    except TypeError as error:
        raise RewardError(f"part {label!r}: transform {name} needs {', '.join(allowed)}: {error}") from error
    text = ", ".join(f"{option}={value!r}" for option, value in sorted(options.items()))
    if len(text) > 100:
        text = hashlib.sha256(text.encode()).hexdigest()[:12]
    made.described = name + (f"[{text}]" if text else "")
    return made


def _options(found: type[Transform]) -> list[str]:
    classes = [found, RunningStats] if found is RunningZScore else [found]
    parameters = [p for cls in classes for p in inspect.signature(cls).parameters.values()]
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def read_references(given: Scores) -> Tensor | dict[str, Tensor]:
    """Return the reference scores `[M]` of all prompts, or of each prompt, from a list, a mapping or a JSON file."""
    found: Any = _read(Path(given)) if isinstance(given, (str, PathLike)) else given
    if isinstance(found, Mapping):
        return {prompt: _checked(scores, f"references of {prompt!r}") for prompt, scores in found.items()}
    return _checked(found, "references")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RewardError(f"references {str(path)!r}: not readable as JSON ({error})") from error


def _checked(values: Any, what: str) -> Tensor:
    try:
        scores = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{what}: a list of numbers is expected, got {str(values)[:60]!r}") from error
    if not len(scores) or not scores.isfinite().all():
        raise RewardError(f"{what}: at least one number is expected, and only finite ones")
    return scores


def _found(table: dict[str, Tensor], prompt: str) -> Tensor:
    if prompt not in table:
        raise RewardError(f"no references for the prompt {prompt!r}; the file or mapping has {len(table)} others")
    return table[prompt]


def _chosen(table: Tensor | dict[str, Tensor], prompts: Sequence[str] | None, like: Tensor) -> Tensor:
    if not isinstance(table, dict):
        return table.to(like)
    return torch.stack([_found(table, prompt) for prompt in prompts or ()]).to(like)
