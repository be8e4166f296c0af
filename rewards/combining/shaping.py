"""Shape scores before they are combined: centring, squashing, normalising. Pure functions, and running statistics.

* LSC, the log-sigmoid-centred transform: Wang et al. 2024, "Transforming and Combining Rewards for Aligning Large
  Language Models" (arXiv:2402.00742). A sum of LSC rewards is the logarithm of the probability that all are good,
  which holds for rewards of Bradley-Terry type; a reward that is a probability already enters by its logarithm.
* PAR, preference as reward: Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (arXiv:2502.18770).
* Group z-score: GRPO, Shao et al. 2024 (arXiv:2402.03300).

Every function keeps NaN where it finds it, and leaves NaN out of the statistics that other samples are shaped by.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.errors import RewardError

Z85 = 1.0364333894937898
"""The 85th percentile of the standard normal distribution."""
EVERYTHING = "*"
"""The key of statistics that are not kept apart by prompt."""


def reference_level(references: Float[Tensor, "*batch references"], z: float = Z85) -> Float[Tensor, "*batch"]:
    """Return `mean + z * std` (population) of the reference policy's scores: by default their 85th percentile.

    The percentile is that of a Gaussian fitted to the scores, as in the PAR authors' implementation of LSC.
    """
    return references.mean(-1) + z * references.std(-1, unbiased=False)


def log_sigmoid_centred(
    scores: Float[Tensor, " batch"], reference: Float[Tensor, "*reference"] | float
) -> Float[Tensor, " batch"]:
    """LSC: `log sigmoid(score - reference)`, at most 0; one reference for all, or one per sample."""
    return F.logsigmoid(scores - reference)


def par(scores: Float[Tensor, " batch"], references: Float[Tensor, "*reference samples"]) -> Float[Tensor, " batch"]:
    """PAR: mean over M reference scores of `sigmoid(score - reference)`, in (0, 1).

    references: `[M]` for all samples or `[B, M]`; M = 1 suffices.
    """
    return torch.sigmoid(scores[:, None] - references).mean(-1)


def group_zscore(
    scores: Float[Tensor, " batch"], groups: Sequence[Hashable], eps: float = 1e-4, unbiased: bool = False
) -> Float[Tensor, " batch"]:
    """Normalise within groups (the samples of one prompt): `(score - mean) / (std + eps)`.

    groups: one label per sample. The standard deviation is that of the population (Flow-GRPO's code), or with
    `unbiased` that of a sample (TRL's code). A group of one, or of equal scores, becomes 0, without
    a gradient.
    """
    if len(groups) != len(scores):
        raise RewardError(f"{len(groups)} groups for {len(scores)} scores; give one label each")
    shaped = scores - scores  # zero where there is a number, NaN where there is none
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    known = scores.isfinite().tolist()
    for positions in members.values():
        rows = torch.tensor([i for i in positions if known[i]], device=scores.device, dtype=torch.long)
        if len(rows) > 1:
            values = scores[rows]
            centred = values - values.mean()
            variance = centred.square().sum() / (len(rows) - unbiased)
            if variance > 0:
                shaped = shaped.index_put((rows,), centred / (variance.sqrt() + eps))
    return shaped


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of the scores seen so far."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Moments:
        """Return the moments of values, without NaN and infinities."""
        known = [value for value in values if math.isfinite(value)]
        if not known:
            return cls()
        mean = math.fsum(known) / len(known)
        return cls(len(known), mean, math.fsum((value - mean) ** 2 for value in known))

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both together (Chan, Golub and LeVeque 1979); Welford's update is a batch of one."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * self.count * other.count / count)

    @property
    def std(self) -> float:
        """Standard deviation of the population."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0


class RunningStats(nn.Module):
    """Mean and standard deviation of all scores seen so far, for all prompts together or by key.

    update_before: a batch enters the statistics before it is normalised by them (as the PAR authors do), else after.
    warm_up: scores of a key that has seen fewer than this many pass unchanged. frozen: the statistics no longer
    change. When torch.distributed is initialised, an update merges the batches of all ranks, so that every rank must
    call it; `distributed=False` keeps each rank's own. `state_dict` holds the statistics.
    """

    def __init__(
        self,
        *,
        update_before: bool = True,
        warm_up: int = 2,
        frozen: bool = False,
        distributed: bool = True,
        eps: float = 1e-8,
    ) -> None:
        """Start without statistics."""
        super().__init__()
        if warm_up < 1:
            raise RewardError(f"warm_up is {warm_up}; at least 1 is allowed")
        self.update_before, self.warm_up, self.frozen = update_before, warm_up, frozen
        self.distributed, self.eps = distributed, eps
        self.moments: dict[str, Moments] = {}

    def update(self, scores: Float[Tensor, " batch"], keys: Sequence[str] | None = None) -> None:
        """Add scores to the statistics, without NaN and infinities."""
        if self.frozen:
            return
        by_key: dict[str, list[float]] = {}
        for key, value in zip(self._keys(scores, keys), scores.detach().tolist(), strict=True):
            by_key.setdefault(key, []).append(value)
        batch = {key: Moments.of(values) for key, values in by_key.items()}
        for part in _of_all_ranks(batch) if self.distributed else [batch]:
            for key, moments in part.items():
                self.moments[key] = self.moments.get(key, Moments()).merged(moments)

    def normalise(self, scores: Float[Tensor, " batch"], keys: Sequence[str] | None = None) -> Float[Tensor, " batch"]:
        """Return `(score - mean) / (std + eps)` with the statistics so far; differentiable in the scores."""
        seen = [self.moments.get(key, Moments()) for key in self._keys(scores, keys)]
        cold = [moments.count < self.warm_up for moments in seen]
        mean = scores.new_tensor([0.0 if c else moments.mean for c, moments in zip(cold, seen, strict=True)])
        width = scores.new_tensor([1.0 if c else m.std + self.eps for c, m in zip(cold, seen, strict=True)])
        return (scores - mean) / width

    def forward(self, scores: Float[Tensor, " batch"], keys: Sequence[str] | None = None) -> Float[Tensor, " batch"]:
        """Update and normalise, in the order that `update_before` says."""
        if self.update_before:
            self.update(scores, keys)
        shaped = self.normalise(scores, keys)
        if not self.update_before:
            self.update(scores, keys)
        return shaped

    def get_extra_state(self) -> dict[str, list[float]]:
        """Return the statistics as plain numbers, for `state_dict`."""
        return {key: [float(number) for number in astuple(moments)] for key, moments in self.moments.items()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the statistics from a `state_dict`."""
        self.moments = {key: Moments(int(count), mean, m2) for key, (count, mean, m2) in state.items()}

    @staticmethod
    def _keys(scores: Tensor, keys: Sequence[str] | None) -> Sequence[str]:
        return [EVERYTHING] * len(scores) if keys is None else keys


def _of_all_ranks(batch: dict[str, Moments]) -> list[dict[str, Moments]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [batch]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, batch)
    return gathered
