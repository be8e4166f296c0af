"""One reward built from others: sums, means, minima, products and ensembles, with gates.

In YAML, and alike in Python:

    name: combine
    mode: harmonic
    parts:
      clip: {weight: 0.7, factor: 0.5, offset: 0.5, weights: hf-hub:org/model}
      aesthetic: {weight: 0.3}

A part is a reward's own options and, beside them: `name` (of the reward, where the label is not it), `weight`,
`transform` (see `rewards.combining.transforms`), `factor` and `offset` (of the transformed score: `factor * score +
offset`), or `gate` alone: the least score, or the greatest where lower is better, with which the whole is not
`closed`. A bare number is a weight; a part may be a combination in its turn.

| mode | score | contributions | weights |
|---|---|---|---|
| `weighted-sum` | sum of w r | w r; they add up to the score | any; 1 where not given |
| `mean` | sum of r / K | r / K | none |
| `harmonic` | 1 / sum of w / (r + 1e-8) | w / (r + 1e-8); they add up to 1 / score | add up to 1 |
| `geometric` | exp of the sum of w log r | w log r; they add up to log score | add up to 1 |
| `product` | product of r | log r; they add up to log score | none |
| `min`, `worst-case` | smallest r | r of the smallest, 0 of the others | none |
| `uncertainty-weighted` | mean - lam * var, or std | each part's share; they add up to the score | none |

Sources: weighted harmonic mean as in the lambda-Harmonic reward of RPO (Miao et al. 2024), whose two terms it
generalises; ensembles of rewards of one quantity, Coste et al. 2024, "Reward Model Ensembles Help Mitigate
Overoptimization" (arXiv:2310.02743): their members must be on one scale. Weights are never rescaled in silence: where
a mode needs them to add up to 1 and they do not, `normalise=True` divides them by their sum, and else it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Reward
from rewards.bases.derived import inherit_facts
from rewards.combining.combine_modes import MODES, POSITIVE, bounds
from rewards.combining.combine_parts import Part, check_direction, weights_of
from rewards.combining.shaping import RunningStats
from rewards.errors import RewardError, choices
from rewards.media import Media, check_tensor, read_media

NAN = ("raise", "propagate")


class Combine(Reward):
    """Combination of other rewards: sum, mean, minimum, product, ensemble, gates.

    parts: labels to specifications, see above. nan: `raise` (the default), `propagate`, or a number that takes the
    place of a part's shaped score where the part has none; a gate is then closed. floor: least shaped score, for the
    modes that need positive ones (without it a score that is not positive is an error; below the floor there is no
    gradient). closed: the score where a gate is closed. lam, spread: of `uncertainty-weighted`, in `variance` (over
    the population of parts) or `std`.

    Facts follow from the parts: it needs what they need together, and has a gradient if all but gates have.
    """

    name: ClassVar[str] = "combine"
    differentiable = True
    licence = "Apache-2.0; parts: their own"
    source = "its parts"
    citation = "Coste et al. 2024, arXiv:2310.02743; Wang et al. 2024, arXiv:2402.00742"

    def __init__(
        self,
        *,
        parts: Mapping[str, Any],
        mode: str = "weighted-sum",
        normalise: bool = False,
        nan: str | float = "raise",
        floor: float | None = None,
        closed: float = 0.0,
        lam: float = 1.0,
        spread: str = "variance",
        **options: Any,
    ) -> None:
        """Load the parts, with the device and dtype of the combination unless their own options differ."""
        super().__init__(**options)
        if mode not in MODES:
            raise RewardError(f"combine: mode {mode!r} is unknown; {choices(mode, MODES)}")
        if isinstance(nan, str) and nan not in NAN:
            raise RewardError(f"combine: nan is {nan!r}; {choices(nan, NAN)}, or a number")
        if spread not in ("variance", "std"):
            raise RewardError(f"combine: spread is {spread!r}; {choices(spread, ('variance', 'std'))}")
        if not isinstance(parts, Mapping):
            raise RewardError(f"combine: parts is a {type(parts).__name__}; give a mapping of labels to options")
        self.mode, self.nan, self.floor, self.closed, self.lam, self.spread = mode, nan, floor, closed, lam, spread
        common = {"device": self.device, "dtype": self.dtype}
        common |= {key: value for key, value in options.items() if key == "batch_size"}
        loaded = [Part(label, spec, common) for label, spec in parts.items()]
        self._modules_of_parts = nn.ModuleList(loaded)
        self.summed = [part for part in loaded if part.gate is None]
        self.gates = [part for part in loaded if part.gate is not None]
        if not self.summed:
            raise RewardError("combine: all parts are gates; give at least one part that is not a gate")
        self.weight = weights_of(self.summed, mode, normalise)
        check_direction(self.summed, self.weight, mode)
        self._state_facts()

    @property
    def parts(self) -> list[Part]:
        """Scored parts first, then gates."""
        return [*self.summed, *self.gates]

    def forward(
        self,
        media: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Score like every reward; each part uses its own micro-batches, and files are read once."""
        raw, prompts = self._run_parts(media, prompts, references)
        return self._combined(raw, prompts, learn=True)[0]

    def score(
        self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
    ) -> Float[Tensor, " batch"]:
        """Score one micro-batch, in the dtype of the parts."""

        def of(part: Part) -> Tensor:
            own = None if references is None else part.reward.prepare_references(list(references))
            return part.reward.score(media, prompts, own)

        raw = {part.label: of(part) for part in self.summed}
        with torch.no_grad():
            raw |= {part.label: of(part) for part in self.gates}
        return self._combined(raw, prompts, learn=True)[0]

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every medium against every prompt, through the matrices of the parts."""
        self._check_matrix(prompts)
        media = _read_once(media, self.modality)

        def of(part: Part) -> Tensor:
            given = self._given(part, media)
            if "prompts" in part.reward.needs:
                return part.reward.matrix(given, prompts)
            return part.reward(given)[:, None].expand(-1, len(prompts))

        raw = {part.label: of(part) for part in self.parts}
        columns = [
            self._combined({label: scores[:, i] for label, scores in raw.items()}, [prompt] * len(media), learn=False)
            for i, prompt in enumerate(prompts)
        ]
        return torch.stack([scores for scores, _ in columns], dim=1)

    def part_scores(
        self,
        media: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return each part's own score by label, each `[B]`, before any transform, without updating statistics."""
        with self._as_learnt():
            return self._run_parts(media, prompts, references)[0]

    def contributions(
        self,
        media: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return each part's contribution by label, each `[B]`, in the mode's own terms (table above).

        They are those of open gates; a gate's own entry is 1 where it is open and 0 where it is closed. Running
        statistics are left as they are, also those of combinations among the parts.
        """
        with self._as_learnt():
            raw, prompts = self._run_parts(media, prompts, references)
            return self._combined(raw, prompts, learn=False)[1]

    def pairwise(
        self,
        first: Media,
        second: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return by how much the first of each pair is better than the second: `[B]`, positive where it is better.

        Where scores depend on the batch, both are scored in one, so that they are normalised alike.
        """
        if self.batch_invariant:
            return super().pairwise(first, second, prompts=prompts, references=references)
        if len(first) != len(second):
            raise RewardError(f"{self.name}: {len(first)} first and {len(second)} second media; give one each")
        twice = None if references is None else [*references, *references]
        both = self([*first, *second], prompts=None if prompts is None else [*prompts, *prompts], references=twice)
        ahead, behind = both.split(len(first))
        return ahead - behind

    @contextmanager
    def _as_learnt(self) -> Iterator[None]:
        """Keep running statistics unchanged, also in combinations among the parts."""
        learning = [part for part in self.modules() if isinstance(part, RunningStats) and not part.frozen]
        for stats in learning:
            stats.frozen = True
        try:
            yield
        finally:
            for stats in learning:
                stats.frozen = False

    def _run_parts(
        self, media: Media, prompts: Sequence[str] | None, references: Any
    ) -> tuple[dict[str, Tensor], list[str] | None]:
        media = _read_once(media, self.modality)
        prompts = self._check_prompts(prompts, len(media))
        references = self._check_references(references, len(media))
        raw = {
            part.label: part.reward(self._given(part, media), prompts=prompts, references=references)
            for part in self.parts
        }
        return raw, prompts

    def _given(self, part: Part, media: Tensor | list[Tensor]) -> Any:
        """Return the media for a part: detached for a gate, which has no gradient and need not support one."""
        if part.gate is not None:
            return media.detach() if isinstance(media, Tensor) else [item.detach() for item in media]
        asked = media.requires_grad if isinstance(media, Tensor) else any(item.requires_grad for item in media)
        if asked and torch.is_grad_enabled() and not part.reward.differentiable:
            raise RewardError(
                f"{self.name} is not differentiable because its part {part.label!r} is not; give it media.detach()"
            )
        return media

    def _combined(
        self, raw: dict[str, Tensor], prompts: Sequence[str] | None, learn: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = torch.stack(
            [self._without_nan(part, part.shape(raw[part.label], prompts, learn)) for part in self.summed]
        )
        if self.mode in POSITIVE:
            values = self._positive(values)
        scores, shares = MODES[self.mode](values, values.new_tensor(self.weight), self.lam, self.spread == "std")
        contributions = {part.label: share for part, share in zip(self.summed, shares, strict=True)}
        for part in self.gates:
            found = raw[part.label]
            known = self._without_nan(part, found)
            is_open = part.is_open(found)
            scores = torch.where(is_open, scores, torch.full_like(scores, self.closed))
            if self.nan == "propagate":
                scores = torch.where(known.isnan(), known, scores)
            contributions[part.label] = is_open.to(scores.dtype)
        return scores, contributions

    def _without_nan(self, part: Part, scores: Tensor) -> Tensor:
        missing = scores.isnan()
        if self.nan == "propagate" or not missing.any():
            return scores
        if self.nan == "raise":
            raise RewardError(
                f"{self.name}: part {part.label!r} gave NaN for {int(missing.sum())} of {len(scores)} media; "
                "set nan='propagate', or nan to a number that replaces it"
            )
        return torch.where(missing, torch.full_like(scores, float(self.nan)), scores)

    def _positive(self, values: Tensor) -> Tensor:
        if self.floor is not None:
            values = values.clamp(min=self.floor)
        wrong = values < 0 if self.mode == "product" else values <= 0
        for part, row, bad in zip(self.summed, values, wrong, strict=True):
            if bad.any():
                least, needed = row[bad].min().item(), "none below" if self.mode == "product" else "all above"
                raise RewardError(
                    f"{self.name}: part {part.label!r} has a score of {least:.4g}, and mode {self.mode!r} needs "
                    f"{needed} 0; give it factor and offset, "
                    "a transform such as sigmoid, or give the combination a floor"
                )
        return values

    def _state_facts(self) -> None:
        rewards = [part.reward for part in self.parts]
        inherit_facts(self, rewards)
        self.needs = frozenset().union(*(part.needs for part in self.parts))
        self.differentiable = all(part.reward.differentiable for part in self.summed)
        self.batch_invariant = all(part.batch_invariant for part in self.parts)
        self.citation = "; ".join(dict.fromkeys(reward.citation for reward in rewards if reward.citation))
        self.version = f"{self.mode}: " + ", ".join(map(str, self.parts))
        self.range = bounds(
            self.mode, [part.range for part in self.summed], self.weight, self.lam, self.spread == "std"
        )
        if self.gates:
            self.range = min(self.range[0], self.closed), max(self.range[1], self.closed)


def _read_once(media: Media, modality: str) -> Tensor | list[Tensor]:
    """Read files and images into tensors, so that the parts do not each read them again."""
    if isinstance(media, Tensor):
        check_tensor(media, modality)
        return media
    items = {
        i: item for positions, group in read_media(media, modality) for i, item in zip(positions, group, strict=True)
    }
    return [items[i] for i in range(len(items))]
