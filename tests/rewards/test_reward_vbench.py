"""VBench's dimensions against the models' own libraries, frame by frame, on tiny models of the real classes."""

import open_clip
import pytest
import torch
import torchvision.transforms.functional as V
from contract import check_contract, smooth_images
from safetensors.torch import load_file, save_file
from tiny_towers import write_vit

from rewards import RewardError, load_reward, vbench
from rewards.backbones.preprocess import IMAGENET, OPENAI
from rewards.vbench_total import BOUNDS, vbench_total


def videos(count=8, frames=3, height=40, width=56):
    """Videos `[count, frames, 3, height, width]` of frames that have nothing to do with each other."""
    return smooth_images(count * frames, height, width).unflatten(0, (count, frames))


def by_frames(features):
    """The formula of consistency, frame after frame."""
    unit = [f / f.norm() for f in features.double()]
    found = [
        (max(0.0, float(unit[t - 1] @ unit[t])) + max(0.0, float(unit[0] @ unit[t]))) / 2 for t in range(1, len(unit))
    ]
    return sum(found) / len(found)


def prepared(video, mode, statistics, size=None):
    """Resize by torchvision without antialiasing, on levels from 0 to 255, as VBench's readers give them."""
    levels = V.resize(video * 255, 32, mode, antialias=False)
    levels = levels if size is None else V.center_crop(levels, size)
    return V.normalize(levels / 255, *statistics)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino")
    return write_vit(path), path


@pytest.fixture(scope="module")
def clip(clip_directory):
    return open_clip.create_model(f"local-dir:{clip_directory}").eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(vbench, "SIZE", 32)


def test_subject_consistency(dino):
    model, path = dino
    media = videos(2)
    reward = load_reward("vbench-subject-consistency", weights=path, device="cpu")
    with torch.no_grad():
        # 40 x 56 becomes 32 x 44: the patches of 8 are 4 x 5, the rest of the width is left out
        expected = [
            by_frames(
                model(prepared(video, V.InterpolationMode.BILINEAR, IMAGENET), interpolate_pos_encoding=True)[0][:, 0]
            )
            for video in media
        ]
    assert reward(media).tolist() == pytest.approx(expected, abs=1e-5)
    still = media[:, :1].expand(-1, 4, -1, -1, -1)
    assert reward(still).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    check_contract(reward, media=videos(), half_atol=0.02, spread=5e-3)


def test_background_consistency(clip, clip_directory):
    media = videos(2)
    reward = load_reward("vbench-background-consistency", weights=clip_directory, device="cpu")
    with torch.no_grad():
        expected = [
            by_frames(clip.encode_image(prepared(video, V.InterpolationMode.BICUBIC, OPENAI, 32))) for video in media
        ]
    assert reward(media).tolist() == pytest.approx(expected, abs=1e-5)
    assert not any("text" in name for name, _ in reward.named_parameters()), "frames alone are embedded"
    check_contract(reward, media=videos(), half_atol=0.05, spread=5e-3)


def test_consistency_counts_opposite_frames_as_nothing():
    features = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]], [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]])
    half = 0.5**0.5
    assert vbench.consistency(features).tolist() == pytest.approx([0.0, (half + (half + 1) / 2) / 2])


def test_temporal_flickering():
    levels = torch.zeros(1, 3, 3, 4, 4)
    levels[0, 1] = 10 / 255
    levels[0, 2, :, :2] = 61 / 255  # half of the pixels change by 51, half by 10
    reward = load_reward("vbench-temporal-flickering", device="cpu")
    # (255 - (10 + 30.5) / 2) / 255
    assert reward(levels).item() == pytest.approx((255 - 20.25) / 255, abs=1e-6)
    rescaled = load_reward("vbench-temporal-flickering", normalise=True, device="cpu")
    assert rescaled(levels).item() == pytest.approx(((255 - 20.25) / 255 - 0.6293) / 0.3707, abs=1e-5)
    assert rescaled.version == "1, normalised" and rescaled.range == pytest.approx((-0.6293 / 0.3707, 1.0))
    check_contract(reward, media=videos())
    check_contract(rescaled, media=videos())


@pytest.fixture
def head(tmp_path):
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    save_file({"weight": weight, "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_aesthetic_quality(clip, clip_directory, head):
    media = videos(2)
    reward = load_reward("vbench-aesthetic-quality", weights=head, encoder=clip_directory, device="cpu")
    weight = load_file(head)["weight"][0]
    with torch.no_grad():
        embedded = [clip.encode_image(prepared(video, V.InterpolationMode.BICUBIC, OPENAI, 32)) for video in media]
        expected = [((e / e.norm(dim=1, keepdim=True)) @ weight + 5).mean().item() / 10 for e in embedded]
    assert reward(media).tolist() == pytest.approx(expected, abs=1e-5)
    assert reward(media[:, :1]).isfinite().all(), "one frame has an aesthetic quality too"
    check_contract(reward, media=videos(), half_atol=0.02, spread=2e-3)


def test_appearance_style(clip, clip_directory):
    media, styles = videos(2), ["Van Gogh style", "in black and white"]
    reward = load_reward("vbench-appearance-style", weights=clip_directory, device="cpu")
    images = load_reward("clip", weights=clip_directory, device="cpu")
    expected = [images(video, prompts=[style] * 3).mean().item() for video, style in zip(media, styles, strict=True)]
    assert reward(media, prompts=styles).tolist() == pytest.approx(expected, abs=1e-6)
    rescaled = load_reward("vbench-appearance-style", weights=clip_directory, normalise=True, device="cpu")
    again = [(score - 0.0009) / (0.2855 - 0.0009) for score in expected]
    assert rescaled(media, prompts=styles).tolist() == pytest.approx(again, abs=1e-5)
    check_contract(reward, media=videos(), half_atol=0.05, spread=1e-2, long_prompt="a " * 30)


def test_a_single_frame_has_no_consistency(dino):
    reward = load_reward("vbench-subject-consistency", weights=dino[1], device="cpu")
    with pytest.raises(RewardError, match="vbench-subject-consistency: a video of 1 frame; at least 2 are needed"):
        reward(videos(1, 1))


def test_total():
    perfect = {name: high for name, (_, high) in BOUNDS.items()}
    assert vbench_total(perfect) == pytest.approx({"quality": 1.0, "semantic": 1.0, "total": 1.0})
    worst = {name: low for name, (low, _) in BOUNDS.items()}
    assert vbench_total(worst | {"dynamic degree": 1.0}) == pytest.approx(
        {"quality": 0.5 / 6.5, "semantic": 0.0, "total": 4 * 0.5 / 6.5 / 5}
    )
    assert vbench_total(worst | {"scene": 0.4111})["total"] == pytest.approx(0.5 / 9 / 5)
    with pytest.raises(RewardError, match="over all 16 dimensions; scene is missing"):
        vbench_total({name: 0.5 for name in BOUNDS if name != "scene"})
    with pytest.raises(RewardError, match="no dimension 'colour'; did you mean 'color'"):
        vbench_total({"colour": 1.0})
