"""Dynamic degree against torchvision's own RAFT and by hand; motion smoothness with known interpolators."""

import numpy as np
import pytest
import torch
from contract import check_contract, smooth_images
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_large

from rewards import RewardError, load_reward, video_motion


def videos(count=8, frames=4, height=40, width=48):
    return smooth_images(count * frames, height, width).unflatten(0, (count, frames))


@pytest.fixture(scope="module")
def raft(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.safetensors"
    model = raft_large(weights=None).eval()
    save_file(model.state_dict(), path)
    return model, path


@pytest.fixture(scope="module")
def dynamic(raft):
    return load_reward("vbench-dynamic-degree", weights=raft[1], device="cpu")


def test_speeds_are_those_of_raft(raft, dynamic, monkeypatch):
    monkeypatch.setattr(video_motion, "UPDATES", 1)
    media = videos(1, 3, 130, 128)
    # 130 rows: 3 above and 3 below to 136
    edged = torch.cat([media[:, :, :, :1].expand(-1, -1, -1, 3, -1), media], dim=3)
    edged = torch.cat([edged, media[:, :, :, -1:].expand(-1, -1, -1, 3, -1)], dim=3)
    expected = []
    for first, second in zip(edged[0, :-1], edged[0, 1:], strict=True):
        with torch.no_grad():
            flow = raft[0](2 * first[None] - 1, 2 * second[None] - 1, num_flow_updates=1)[-1][0].numpy()
        lengths = np.sort(np.hypot(*flow), axis=None)[::-1]
        expected.append(lengths[: int(136 * 128 * 0.05)].mean())
    assert dynamic.speeds(media)[0].tolist() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(RewardError, match="frames of 40 x 48 pixels; RAFT needs at least 128 per side"):
        dynamic(videos(1))


@pytest.mark.parametrize(
    ("speeds", "frames", "fps", "expected"),
    [
        # the shorter edge has 128 pixels: more than 3 of them; 8 frames need 2 such pairs
        ([3.1, 3.1, 0, 0, 0, 0, 0], 8, 8.0, 1.0),
        ([3.1, 2.9, 3.0, 0, 0, 0, 0], 8, 8.0, 0.0),
        # every third frame of 24 a second; 4 a second is half the rate, and twice the threshold
        ([3.1, 3.1, 0, 0, 0, 0, 0], 24, 24.0, 1.0),
        ([6.1, 6.1, 0, 0, 0, 0, 0], 8, 4.0, 1.0),
        ([5.9, 5.9, 5.9, 5.9, 0, 0, 0], 8, 4.0, 0.0),
    ],
)
def test_threshold_and_count(dynamic, monkeypatch, speeds, frames, fps, expected):
    def known(media):
        assert media.shape == (1, 8, 3, 128, 160)
        return torch.tensor([speeds])

    monkeypatch.setattr(dynamic, "media_fps", fps)
    object.__setattr__(dynamic, "speeds", known)
    try:
        assert dynamic(torch.full((1, frames, 3, 128, 160), 0.5)).item() == expected
    finally:
        del dynamic.__dict__["speeds"]


def test_contract_of_dynamic_degree(raft, monkeypatch):
    def by_change(self, first, second):
        return 40 * (second - first)[:, :2]

    monkeypatch.setattr(video_motion.DynamicDegree, "flow", by_change)
    media = videos(8, 4, 128, 136)
    media[::2] = 0.5 + 0.02 * media[::2]
    check_contract(load_reward("vbench-dynamic-degree", weights=raft[1], device="cpu"), media=media)


def test_refusals_of_dynamic_degree(raft, dynamic, tmp_path):
    with pytest.raises(RewardError, match="a video of 2 frames; at least 3 are needed"):
        dynamic(videos(1, 2, 128, 128))
    with pytest.raises(RewardError, match="4 frames at 24 per second leave 2 at 8 per second"):
        load_reward("vbench-dynamic-degree", weights=raft[1], media_fps=24, device="cpu")(videos(1, 4, 128, 128))
    with pytest.raises(RewardError, match="media_fps is 0"):
        load_reward("vbench-dynamic-degree", weights=raft[1], media_fps=0)
    with pytest.raises(RewardError, match="no such file"):
        load_reward("vbench-dynamic-degree", weights=tmp_path / "none.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RewardError, match="lacks .* has unknown x"):
        load_reward("vbench-dynamic-degree", weights=tmp_path / "other.safetensors")


def midway(first, second):
    return (first + second) / 2


def test_motion_smoothness():
    ramp = torch.linspace(0, 1, 7).view(1, 7, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    reward = load_reward("motion-smoothness", interpolator=midway, device="cpu")
    assert reward(ramp).item() == pytest.approx(1.0, abs=1e-6)
    jerky = ramp.clone()
    jerky[:, 3] += 0.3  # one of the odd frames 1, 3, 5
    assert reward(jerky).item() == pytest.approx(0.9, abs=1e-6)
    longer = torch.cat([jerky, torch.zeros(1, 1, 3, 8, 8)], dim=1)  # an eighth frame, to which none follows
    assert reward(longer).item() == pytest.approx(0.9, abs=1e-6)
    assert reward.version == "midway"
    check_contract(reward, media=videos())


def test_interpolators_are_found_by_name_and_checked():
    named = load_reward("motion-smoothness", interpolator="torch:lerp", device="cpu")
    assert named.version == "torch:lerp"
    for interpolator, message in [
        ("nowhere.at:all", "interpolator 'nowhere.at:all': No module named 'nowhere'"),
        ("torch", "write 'module.path:name'"),
        (3, "interpolator 3 is not callable"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward("motion-smoothness", interpolator=interpolator)
    half = load_reward("motion-smoothness", interpolator=lambda a, b: a[..., ::2], device="cpu")
    with pytest.raises(RewardError, match=r"returned \[1, 3, 40, 24\] for frames \[1, 3, 40, 48\]"):
        half(videos(1))
    with pytest.raises(RewardError, match="a video of 2 frames"):
        half(videos(1, 2))
