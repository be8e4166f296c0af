"""Rewards of videos without weights of their own: motion by block matching, likeness of frames by any CLIP."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardError, TwoTowerReward, load_reward
from rewards.block_motion import block_lengths


def moving_square(step: tuple[int, int], frames: int = 5, side: int = 128) -> Tensor:
    """Return a white square of 24 pixels that moves by `step` (down, right) a frame: `[1, F, 3, side, side]`."""
    video = torch.full((1, frames, 3, side, side), 0.4)
    for frame in range(frames):
        top, left = 40 + frame * step[0], 36 + frame * step[1]
        video[0, frame, :, top : top + 24, left : left + 24] = 1.0
    return video


@pytest.mark.parametrize("step", [(0, 0), (0, 3), (4, 0), (-3, 4), (0, -7)])
def test_the_length_is_that_of_the_step(step: tuple[int, int]) -> None:
    # At 128 pixels a side nothing is resized; 256 pixels a side are the unit. A block that holds one straight edge
    # alone is matched across that edge, which takes 2 % of a diagonal step here.
    expected = 2 * math.hypot(*step)
    assert load_reward("block-motion")(moving_square(step)).item() == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_the_size_of_the_video_does_not_matter() -> None:
    small, large = moving_square((0, 4)), moving_square((0, 4)).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert load_reward("block-motion")(large).item() == pytest.approx(load_reward("block-motion")(small).item())


def test_flicker_noise_and_stills_do_not_move() -> None:
    torch.manual_seed(0)
    scene = torch.rand(1, 1, 3, 16, 16).repeat_interleave(8, -1).repeat_interleave(8, -2)
    flicker = (scene * torch.tensor([0.6, 1.0, 0.6, 1.0]).view(1, 4, 1, 1, 1)).clamp(0, 1)
    noise = torch.rand(1, 4, 3, 128, 128)
    reward = load_reward("block-motion")
    assert reward(scene.expand(1, 4, -1, -1, -1)).item() == 0
    assert reward(flicker).item() == 0
    assert reward(noise).item() == 0


def test_blocks_are_found_by_full_search() -> None:
    torch.manual_seed(1)
    first = torch.rand(1, 32, 48)
    second = torch.roll(first, (2, -1), dims=(1, 2))
    found = block_lengths(first, second).view(2, 3)
    assert found[0, 1].item() == pytest.approx(math.hypot(2, 1))  # not at the border, where the roll wraps
    assert found[0].max() <= math.hypot(8, 8)


class Patches(TwoTowerReward):
    """Embeds an image as a few of its pixels."""

    name = "patches-of-a-test"

    def encode_media(self, media: Tensor) -> Tensor:
        return media[:, :, ::8, ::8].flatten(1) - 0.3

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        raise NotImplementedError

    def compare(self, cosine: Tensor) -> Tensor:
        return cosine


def test_frame_consistency_is_vbench_s_formula_over_embeddings() -> None:
    torch.manual_seed(2)
    videos = torch.rand(2, 4, 3, 32, 32)
    inner = Patches()
    expected = []
    for video in videos:
        rows = [inner.encode_media(frame[None])[0].double() for frame in video]
        cosines: Any = lambda a, b: max(0.0, (a @ b / a.norm() / b.norm()).item())  # noqa: E731
        pairs = [(cosines(rows[t - 1], rows[t]) + cosines(rows[0], rows[t])) / 2 for t in range(1, 4)]
        expected.append(sum(pairs) / 3)
    reward = load_reward("frame-consistency", by=inner)
    assert reward(videos).tolist() == pytest.approx(expected, abs=1e-5)
    assert reward(videos[:, :1].expand(-1, 3, -1, -1, -1)).tolist() == pytest.approx([1, 1])
    videos.requires_grad_()
    reward(videos).sum().backward()
    assert videos.grad is not None and videos.grad.abs().sum() > 0


def test_what_cannot_be_measured_is_refused() -> None:
    for name, options in (("block-motion", {}), ("frame-consistency", {"by": Patches()})):
        with pytest.raises(RewardError, match=f"{name}: a video of 1 frame; at least 2 are needed"):
            load_reward(name, **options)(torch.rand(1, 1, 3, 32, 32))
    with pytest.raises(RewardError, match="by 'jpeg-compressibility' embeds no images"):
        load_reward("frame-consistency", by="jpeg-compressibility")
