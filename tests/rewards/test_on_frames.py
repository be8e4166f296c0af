"""An image reward on the frames of videos: the mean over frames spread evenly, its prompts and its gradient."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import Brightness, BrightnessOfRed, Motion

from rewards import load_reward
from rewards.combining.on_frames import OnFrames, evenly
from rewards.errors import RewardError


def video() -> torch.Tensor:
    """Return two videos of five frames, frame t of brightness t / 10 and 1 - t / 10."""
    levels = torch.arange(5) / 10
    return torch.stack([levels, 1 - levels])[:, :, None, None, None].expand(2, 5, 3, 8, 8).clone()


@pytest.mark.parametrize(("frames", "mean"), [(1, 0.2), (2, 0.2), (3, 0.2), (9, 0.2)])
def test_the_mean_over_frames(frames: int, mean: float) -> None:
    scores = OnFrames(Brightness(device="cpu"), frames)(video())
    torch.testing.assert_close(scores, torch.tensor([mean, 1 - mean]))


def test_the_frames_are_spread_evenly_with_both_ends_and_alone_have_a_gradient() -> None:
    assert [evenly(5, count) for count in (1, 2, 3, 4, 5, 7)] == [
        [2], [0, 4], [0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]
    ]  # fmt: skip
    media = video().requires_grad_()
    OnFrames(Brightness(device="cpu"), 3)(media).sum().backward()
    assert media.grad is not None
    moved = media.grad.abs().amax((0, 2, 3, 4))
    torch.testing.assert_close(moved, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]) / (3 * 3 * 8 * 8))


def test_every_frame_is_asked_with_the_prompt_of_its_video() -> None:
    reward = OnFrames(BrightnessOfRed(device="cpu"), 3)
    assert reward.needs == {"prompts"} and reward.modality == "video"
    torch.testing.assert_close(reward(video(), prompts=["blue", "red"]), torch.tensor([0.0, 0.8]))


def test_a_video_reward_has_no_frames_to_score() -> None:
    with pytest.raises(RewardError, match="motion does not score single images"):
        OnFrames(Motion(device="cpu"), 2)


def test_the_distance_of_videos_is_the_mean_of_that_of_their_frames() -> None:
    inner = load_reward("shapes-clip", device="cpu")
    media = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = OnFrames(inner, 3).embeddings(media)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    one, other = (inner.embeddings(video[[0, 2, 4]]) for video in media)
    torch.testing.assert_close(1 - found[0] @ found[1], (1 - (one * other).sum(1)).mean())


def test_a_reward_that_embeds_nothing_has_no_embeddings_of_frames() -> None:
    with pytest.raises(RewardError, match="embeds no images"):
        OnFrames(Brightness(device="cpu"), 2).embeddings(video())
