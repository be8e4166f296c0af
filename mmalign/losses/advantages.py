"""Advantages: rewards normalised across prompts, as the weights of log-probabilities in a policy gradient.

A = (reward - mean) / (std + 1e-8), with the population's standard deviation, as NumPy's. The functions differ in
the set of rewards that mean and std are taken over:

* `PromptStatistics`: the last rewards of the same prompt across batches (DDPO, Black et al., arXiv 2305.13301,
  appendix; buffer and minimum of the authors' code), the whole batch until there are enough;
* `group_advantages`: the images of the same prompt in this batch (GRPO, Shao et al., arXiv 2402.03300, section 4.1).

Where all rewards of that set are equal, A is exactly 0.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-8


class PromptStatistics:
    """Keeps the last rewards of every prompt; one object per run, saved in checkpoints through `state_dict`.

    buffer_size
        How many rewards of each prompt are kept; the oldest are dropped first.
    min_count
        How many kept rewards, those of the current batch included, a prompt needs for statistics of its own.
    clip
        Advantages are clipped to [-clip, clip] (5 in TRL, 10 in the first ddpo-pytorch); None: they are not.
    """

    def __init__(self, *, buffer_size: int = 16, min_count: int = 16, clip: float | None = 5.0) -> None:
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
            advantages[rows] = _standardise(values[rows], pool)
        return _finish(advantages, rewards, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """Return the stored rewards for a resumed run, as plain lists and numbers that JSON keeps exactly."""
        return {"rewards": {prompt: list(kept) for prompt, kept in self._rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; of longer lists, the last `buffer_size` rewards are kept."""
        self._rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state["rewards"].items()}


def group_advantages(
    prompts: Sequence[str], rewards: Float[Tensor, " batch"], *, clip: float | None = None
) -> Float[Tensor, " batch"]:
    """Return the advantage of each image among the images of its prompt in this batch; 0 for a single image.

    Precision, device and clip as in `PromptStatistics`.

    Raises:
        ValueError: there is not one prompt for each reward, a reward is not finite, or clip is not positive.
    """
    _check_clip(clip)
    values = _finite_rewards(prompts, rewards)
    advantages = torch.empty_like(values)
    for rows in _rows_by_prompt(prompts).values():
        advantages[rows] = _standardise(values[rows], values[rows])
    return _finish(advantages, rewards, clip)


def _standardise(values: Tensor, pool: Tensor) -> Tensor:
    if pool.min() == pool.max():
        return torch.zeros_like(values)
    return (values - pool.mean()) / (pool.std(correction=0) + EPSILON)


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
