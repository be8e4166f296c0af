"""Advantages: rewards normalised across prompts, as the weights of log-probabilities in a policy gradient.

A = (reward - mean) / (max(std, floor * largest |reward|) + epsilon), with the population's standard deviation, as
NumPy's. The functions differ in the set of rewards that the mean is taken over:

* `PromptStatistics`: the last rewards of the same prompt across batches (DDPO, Black et al., arXiv 2305.13301,
  appendix; buffer and minimum of the authors' code), the whole batch until there are enough;
* `group_advantages`: the images of the same prompt in this batch (GRPO, Shao et al., arXiv 2402.03300, section 4.1);
* `each_group_advantages`: the same, but each of several rewards by itself (GDPO, arXiv 2601.05242).

`win_rates` makes rewards of comparisons (Pref-GRPO, arXiv 2508.20751), which do not tell how large a difference is.
`novelty` and `favour_novelty` raise the advantages of good images that differ from the others of their group (GARDO).

`Spread` says what the difference is divided by: the spread of that set, that of the whole batch (arXiv 2503.20783
shows how the former favours prompts whose rewards hardly differ), or nothing. Where all rewards of the set are equal,
A is exactly 0. `epsilon` and `floor` keep rewards that differ by rounding from advantages of order 1: 1e-4 is that of
Flow-GRPO's code (ddpo-pytorch: 1e-6, TRL: 1e-8), and float32 rounds rewards by 6e-8 of their size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STD = ("group", "batch", "none")


@dataclass(frozen=True)
class Spread:
    """What the difference from the mean is divided by.

    std
        ``group``: the standard deviation of the rewards that the mean is taken over; ``batch``: that of all rewards of
        the batch; ``none``: nothing, so that advantages have the rewards' unit.
    epsilon
        Added to the deviation.
    floor
        Least deviation, in units of the largest absolute reward of its set.

    >>> rewards = torch.tensor([1.0, 3.0])
    >>> Spread("group", epsilon=0.0).standardise(rewards, rewards, rewards).tolist()
    [-1.0, 1.0]

    Raises:
        ValueError: std is none of these, or a number is negative or not finite.
    """

    std: str = "group"
    epsilon: float = 1e-4
    floor: float = 1e-5

    def __post_init__(self) -> None:
        """Check the options."""
        if self.std not in STD:
            raise ValueError(f"std={self.std!r} must be one of {', '.join(STD)}")
        if not (0 <= self.epsilon < math.inf and 0 <= self.floor < math.inf):
            raise ValueError(f"epsilon={self.epsilon} and floor={self.floor} must be finite and not negative")

    def standardise(self, values: Tensor, pool: Tensor, batch: Tensor) -> Tensor:
        """Return the advantages of some rewards, given those that the mean is taken over and the whole batch."""
        if pool.min() == pool.max():
            return torch.zeros_like(values)
        centred = values - pool.mean()
        if self.std == "none":
            return centred
        judged = pool if self.std == "group" else batch
        least = self.floor * judged.abs().max()
        return centred / (torch.maximum(judged.std(correction=0), least) + self.epsilon)


USUAL = Spread()


class PromptStatistics:
    """Keeps the last rewards of every prompt; one object per run, saved in checkpoints through `state_dict`.

    buffer_size
        How many rewards of each prompt are kept; the oldest are dropped first.
    min_count
        How many kept rewards, those of the current batch included, a prompt needs for statistics of its own.
    clip
        Advantages are clipped to [-clip, clip] (5 in TRL, 10 in the first ddpo-pytorch); None: they are not.
    spread
        What the difference from the mean is divided by.
    """

    def __init__(
        self, *, buffer_size: int = 16, min_count: int = 16, clip: float | None = 5.0, spread: Spread = USUAL
    ) -> None:
        """Start without any reward.

        Raises:
            ValueError: the sizes are not 1 <= min_count <= buffer_size, or clip is not positive.
        """
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"min_count={min_count} must lie in [1, buffer_size={buffer_size}]: a buffer never holds more rewards"
            )
        _check_clip(clip)
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.clip = clip
        self.spread = spread
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Store the rewards, then return the advantage of each on their device; call this once for each batch.

        In float32 or in the higher precision of the rewards; the statistics are taken in float64.

        Raises:
            ValueError: there is not one prompt for each reward, or a reward is not finite (nothing is remembered).
        """
        values = _finite_rewards(prompts, rewards)
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(value)
        advantages = torch.empty_like(values)
        for prompt, rows in _rows_by_prompt(prompts).items():
            kept = self._rewards[prompt]
            pool = values.new_tensor(list(kept)) if len(kept) >= self.min_count else values
            advantages[rows] = self.spread.standardise(values[rows], pool, values)
        return _finish(advantages, rewards, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """Return the stored rewards for a resumed run, as plain lists and numbers that JSON keeps exactly."""
        return {"rewards": {prompt: list(kept) for prompt, kept in self._rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; of longer lists, the last `buffer_size` rewards are kept."""
        self._rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state["rewards"].items()}


def group_advantages(
    prompts: Sequence[str], rewards: Float[Tensor, " batch"], *, clip: float | None = None, spread: Spread = USUAL
) -> Float[Tensor, " batch"]:
    """Return the advantage of each image among the images of its prompt in this batch; 0 for a single image.

    Precision, device, clip and spread as in `PromptStatistics`.

    Raises:
        ValueError: there is not one prompt for each reward, a reward is not finite, or clip is not positive.
    """
    _check_clip(clip)
    values = _finite_rewards(prompts, rewards)
    advantages = torch.empty_like(values)
    for rows in _rows_by_prompt(prompts).values():
        advantages[rows] = spread.standardise(values[rows], values[rows], values)
    return _finish(advantages, rewards, clip)


def each_group_advantages(
    prompts: Sequence[str],
    rewards: Float[Tensor, "batch rewards"],
    weights: Sequence[float],
    *,
    clip: float | None = None,
    spread: Spread = USUAL,
) -> Float[Tensor, " batch"]:
    """Return GDPO's advantages: those of each reward in its group, summed with weights, over the sum's spread.

    rewards: [B, K], one column for each of the K weights. Normalising the sum instead lets the reward with the largest
    spread decide, and makes a group in which one reward differs equal to one in which all do. `spread.std` is not
    used: each reward is divided by its deviation in the group, and the sum by that of the batch. The sum has mean 0
    already. With one reward this is `group_advantages`, as in the authors' code (NVlabs/GDPO).

    >>> values = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])  # one differs, then both
    >>> each_group_advantages(["a", "a", "b", "b"], values, [1.0, 1.0], spread=Spread(epsilon=0.0))
    tensor([-0.6325,  0.6325, -1.2649,  1.2649])

    Raises:
        ValueError: as for `group_advantages`, or there is not one column for each weight.
    """
    _check_clip(clip)
    if rewards.shape != (len(prompts), len(weights)):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}; needed: {len(prompts)} prompts x {len(weights)}")
    if len(weights) == 1:
        return group_advantages(prompts, weights[0] * rewards[:, 0], clip=clip, spread=spread)
    own = replace(spread, std="group")
    each = [group_advantages(prompts, column.double(), spread=own) for column in rewards.T]
    total = torch.stack([weight * one for weight, one in zip(weights, each, strict=True)]).sum(0)
    deviation = total.std(correction=0)
    whitened = total / (deviation + spread.epsilon) if bool(deviation > 0) else torch.zeros_like(total)
    return _finish(whitened, rewards, clip)


def win_rates(margins: Float[Tensor, "groups size size"], *, tie_margin: float = 0.0) -> Float[Tensor, "groups size"]:
    """Return the share of the comparisons in its group that each image wins, in [0, 1]; a tie counts one half.

    `margins[g, i, j]` tells by how much i is better than j. A margin of at most `tie_margin` is a tie, and so is a
    comparison without an answer (NaN). The diagonal is not read. In the precision of the margins.

    >>> win_rates(torch.tensor([[[0.0, 0.5, 1e-6], [-0.5, 0.0, -0.5], [-1e-6, 0.5, 0.0]]]), tie_margin=0.01)
    tensor([[0.7500, 0.0000, 0.7500]])

    Raises:
        ValueError: there are not two images in a group, or `tie_margin` is negative.
    """
    size = margins.shape[1]
    if size < 2:
        raise ValueError("a group of one image has no comparisons")
    if not tie_margin >= 0:
        raise ValueError(f"tie_margin={tie_margin} must not be negative")
    won = 0.5 + 0.5 * (margins > tie_margin).to(margins.dtype) - 0.5 * (margins < -tie_margin).to(margins.dtype)
    own = torch.diagonal(won, dim1=1, dim2=2)
    return (won.sum(2) - own) / (size - 1)


def novelty(features: Float[Tensor, "groups size features"]) -> Float[Tensor, "groups size"]:
    """Return how far each image is from the nearest other of its group, in units of the group's mean of that.

    The distance is 1 - cosine of features of any length but 0, as in the authors' code (GARDO, tinnerhrhe/GARDO:
    features of DINOv3). The mean of a group is 1; all are 1 where no image differs from its nearest, and in a group of
    two. In the features' precision.

    >>> angles = torch.tensor([0.0, 60.0, 180.0]).deg2rad()  # 0.5 apart, 1.5 apart
    >>> novelty(torch.stack([angles.cos(), angles.sin()], dim=1).unsqueeze(0))
    tensor([[0.6000, 0.6000, 1.8000]])

    Raises:
        ValueError: there are not two images in a group.
    """
    size = features.shape[1]
    if size < 2:
        raise ValueError("a group of one image has no other to be compared with")
    units = torch.nn.functional.normalize(features, dim=2)
    distances = 1 - (units @ units.mT).clamp(-1, 1)
    nearest = distances.masked_fill(torch.eye(size, dtype=torch.bool, device=features.device), torch.inf).amin(2)
    mean = nearest.mean(1, keepdim=True)
    same = mean < 16 * torch.finfo(nearest.dtype).eps  # rounding alone
    return torch.where(same, torch.ones_like(nearest), nearest / mean.clamp(min=torch.finfo(nearest.dtype).tiny))


def favour_novelty(
    advantages: Float[Tensor, " batch"], novelty: Float[Tensor, " batch"], *, clip: float | None = None
) -> Float[Tensor, " batch"]:
    """Return GARDO's advantages: those above 0 are multiplied by the `novelty` of the image, the others stay.

    So a good image counts for more if it differs from the others, while a bad one never gains by that. Clipped as in
    `PromptStatistics`.

    >>> favour_novelty(torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0.5, 2.0, 2.0]))
    tensor([ 0.5000,  2.0000, -2.0000])
    """
    _check_clip(clip)
    return _finish(torch.where(advantages > 0, advantages * novelty.to(advantages), advantages), advantages, clip)


def _rows_by_prompt(prompts: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return rows


def _finite_rewards(prompts: Sequence[str], rewards: Tensor) -> Tensor:
    """Check the rewards and return them in float64 on the CPU, where the statistics are computed."""
    if rewards.shape != (len(prompts),):
        raise ValueError(
            f"{len(prompts)} prompts and rewards of shape {tuple(rewards.shape)}; one reward per prompt is needed"
        )
    values = rewards.detach().to("cpu", torch.float64)
    for prompt, value in zip(prompts, values.tolist(), strict=True):
        if not math.isfinite(value):
            raise ValueError(f"the reward of an image of {prompt!r} is {value}; advantages need finite rewards")
    return values


def _finish(advantages: Tensor, rewards: Tensor, clip: float | None) -> Tensor:
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.to(rewards.device, torch.promote_types(rewards.dtype, torch.float32))


def _check_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive (None: no clipping)")
