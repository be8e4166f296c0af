"""An image reward on videos: the mean of its scores of a few frames, spread evenly over each video."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from rewards.base import Reward
from rewards.bases.derived import inherit_facts
from rewards.bases.two_tower import TwoTowerReward
from rewards.errors import RewardError


class OnFrames(Reward):
    """Score `frames` frames of each video by an image reward and take the mean; it is blind to motion.

    >>> from rewards import load_reward
    >>> import torch
    >>> OnFrames(load_reward("jpeg-compressibility"), frames=3)(torch.rand(2, 9, 3, 16, 16)).shape
    torch.Size([2])
    """

    modality = "video"

    def __init__(self, reward: Reward, frames: int) -> None:
        """Take over the facts of `reward`, which must score images one by one."""
        super().__init__(device=reward.device, batch_size=max(1, reward.batch_size // frames))
        if reward.modality != "image" or not reward.batch_invariant:
            raise RewardError(f"{reward.name} does not score single images, so it cannot score frames; take another")
        inherit_facts(self, [reward])
        self.reward, self.frames, self.modality = reward, frames, "video"
        self.range, self.higher_is_better, self.version = reward.range, reward.higher_is_better, reward.version

    def score(
        self,
        media: Float[Tensor, "batch times 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Return the mean score of each video's frames; all of them where a video has no more than `frames`."""
        chosen = evenly(media.shape[1], self.frames)
        asked = None if prompts is None else [prompt for prompt in prompts for _ in chosen]
        scores: Tensor = self.reward(media[:, chosen].flatten(0, 1), prompts=asked)
        return scores.view(len(media), len(chosen)).mean(1)

    def embeddings(self, media: Float[Tensor, "batch times 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the frames' embeddings side by side, as unit vectors: 1 - cosine is the mean of the frames' own.

        Raises:
            RewardError: the reward embeds no images.
        """
        if not isinstance(self.reward, TwoTowerReward):
            raise RewardError(f"{self.reward.name} embeds no images; take one that does, such as clip")
        chosen = evenly(media.shape[1], self.frames)
        found = self.reward.embeddings(media[:, chosen].flatten(0, 1))
        return found.unflatten(0, (len(media), len(chosen))).flatten(1) / len(chosen) ** 0.5


def on_frames(reward: Reward, frames: int | None) -> Reward:
    """Return the reward on so many frames of videos, or as it is where none are given."""
    return reward if frames is None else OnFrames(reward, frames)


def evenly(total: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over `total`, both ends included; the middle for one, all if fewer.

    >>> evenly(9, 3), evenly(9, 1), evenly(2, 3)
    ([0, 4, 8], [4], [0, 1])
    """
    if count >= total:
        return list(range(total))
    return [total // 2] if count == 1 else [round(index * (total - 1) / (count - 1)) for index in range(count)]
