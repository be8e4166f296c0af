"""LAION's heads: the published numbers on the published embeddings, and a tiny CLIP underneath."""

from pathlib import Path

import numpy as np
import pytest
import torch
from contract import check_contract, smooth_images
from golden_data import golden_file
from safetensors.torch import load_file, save_file
from torch import nn

from rewards import RewardError, load_reward
from rewards.aesthetic import VERSIONS, load_head
from rewards.bases.two_tower import unit

# Published embeddings of ratings 0 .. 9 through the published files, by numpy in float64.
V1_L14 = [-2.4579, -0.1379, 1.8951, 3.5849, 5.0997, 6.4701, 7.7870, 9.0480, 10.2264, 11.3044]
V1_B32 = [-1.4700, 0.2728, 1.9900, 3.6114, 5.0874, 6.3926, 7.6682, 8.9155, 9.9166, 11.0056]
V2 = [1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468]
GOLDENS = [("v1-l-14", "l-14", V1_L14, 5.402092), ("v1-b-32", "b-32", V1_B32, None), ("v2", "l-14", V2, 4.545053)]
WIDTHS = (16, 12, 8, 6, 4, 1)


@pytest.fixture(scope="module")
def published():
    return load_file(Path(__file__).parent / "data" / "aesthetic_heads.safetensors")


def write_linear(path, weight, bias):
    save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, path)
    return path


def write_mlp(path, places=(0, 2, 4, 6, 7), suffix="pth"):
    """A head of the published layout over embeddings of 16 numbers, as a torch file."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for place, (before, after) in zip(places, zip(WIDTHS, WIDTHS[1:], strict=False), strict=True):
        state[f"layers.{place}.weight"] = torch.randn(after, before, generator=generator)
        state[f"layers.{place}.bias"] = torch.randn(after, generator=generator)
    torch.save(state, path)
    return state


@pytest.fixture
def aesthetic(tmp_path, clip_directory):
    write_mlp(tmp_path / "head.pth")
    return load_reward("aesthetic", weights=tmp_path / "head.pth", encoder=clip_directory)


@pytest.mark.parametrize(("head", "clip", "expected", "axis"), GOLDENS)
def test_published_numbers(tmp_path, published, head, clip, expected, axis):
    key = head if head in ("v1-l-14", "v1-b-32") else f"{head}-collapsed"
    path = write_linear(tmp_path / "h.safetensors", published[f"{key}.weight"], published[f"{key}.bias"])
    layers = load_head(path)
    embeddings = published[f"embeddings-{clip}"]
    with torch.no_grad():
        assert layers(unit(embeddings))[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
        assert layers(unit(7 * embeddings))[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
        if axis is not None:
            first = torch.eye(768)[:1]
            assert layers(unit(3 * first)).item() == pytest.approx(axis, abs=2e-6)


@pytest.mark.parametrize(("head", "clip", "expected", "axis"), GOLDENS)
def test_published_numbers_from_the_golden_data(tmp_path, head, clip, expected, axis):
    data = np.load(golden_file("aesthetic_heads_cpu.npz"))
    key = {"v1-l-14": "v1_l_14", "v1-b-32": "v1_b_32", "v2": "v2_l14"}[head]
    weight, bias = (torch.from_numpy(data[f"{key}_{part}"]).float() for part in "wb")
    layers = load_head(write_linear(tmp_path / "h.safetensors", weight, bias))
    embeddings = torch.from_numpy(data[f"emb_{clip.replace('-', '')}"])
    with torch.no_grad():
        assert layers(unit(embeddings))[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    if head == "v2":
        assert weight.double().norm().item() == pytest.approx(17.995625, abs=1e-5)
        assert bias.item() == pytest.approx(5.236646, abs=1e-5)


def test_score_is_the_head_on_the_unit_embedding(tmp_path, aesthetic, clip_directory):
    import open_clip

    images = (smooth_images(4, 32, 32) * 255).round() / 255
    model = open_clip.create_model(f"local-dir:{clip_directory}").eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        hidden = model.encode_image((images - mean) / std).double()
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    state = torch.load(tmp_path / "head.pth", weights_only=True)
    for place in (0, 2, 4, 6, 7):
        hidden = hidden @ state[f"layers.{place}.weight"].double().T + state[f"layers.{place}.bias"].double()
    scores = aesthetic(images)
    assert torch.allclose(scores.double(), hidden[:, 0], atol=1e-4) and scores.std() > 0.1


def test_the_variant_with_activations(tmp_path, clip_directory):
    state = write_mlp(tmp_path / "relu.pth", places=(0, 3, 6, 9, 11))
    reward = load_reward(
        "aesthetic", version="v2-ava-logos-relu", weights=tmp_path / "relu.pth", encoder=clip_directory
    )
    hidden = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = reward.double().rate(hidden)
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    for place in (0, 3, 6, 9, 11):
        hidden = hidden @ state[f"layers.{place}.weight"].double().T + state[f"layers.{place}.bias"].double()
        hidden = hidden if place == 11 else hidden.clamp(min=0)
    assert torch.allclose(found, hidden[:, 0], atol=1e-9) and found.std() > 0.1
    assert reward.version == "v2-ava-logos-relu" and reward.facts.files[0].file == "ava+logos-l14-reluMSE.pth"


def test_contract(aesthetic):
    check_contract(aesthetic, atol=2e-4, half_atol=1.0)


def test_the_head_stays_in_float32(aesthetic):
    embeddings = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    whole = aesthetic.rate(embeddings)
    half = aesthetic.half()
    assert half.encoder.model.visual.proj.dtype == torch.float16
    assert torch.equal(half.rate(embeddings), whole)
    assert half.rate(embeddings.half()).dtype == torch.float32


def test_facts_name_the_version_and_the_clip_it_was_trained_on(tmp_path, clip_directory):
    write_mlp(tmp_path / "sa_0_4_vit_b_32_linear.pth")
    reward = load_reward("aesthetic", version="v1-b-32", weights=tmp_path, encoder=clip_directory)
    assert reward.version == "v1-b-32" and reward.facts.licence == "MIT; CLIP MIT"
    assert str(tmp_path) in reward.source and str(clip_directory) in reward.source
    assert {version.clip for version in VERSIONS.values()} == {
        f"ViT-{size}-quickgelu" for size in ("L-14", "B-32", "B-16")
    }
    assert all(len(version.file.sha256) == 64 for version in VERSIONS.values())
    assert not any("text" in name for name, _ in reward.encoder.named_parameters()), "images alone are embedded"


def test_wrong_input_is_refused(tmp_path, clip_directory, aesthetic):
    with pytest.raises(RewardError, match="version 'v3' is unknown; .*allowed: v1, v1-b-16"):
        load_reward("aesthetic", version="v3")
    with pytest.raises(RewardError, match="no such file; give sac"):
        load_reward("aesthetic", weights=tmp_path / "none.pth")
    with pytest.raises(RewardError, match="needs embeddings of 16 numbers, and the CLIP has 20"):
        aesthetic.rate(torch.ones(1, 20))
    state = write_mlp(tmp_path / "bad.pth")
    torch.save({name: value for name, value in state.items() if "7.weight" not in name}, tmp_path / "bad.pth")
    with pytest.raises(RewardError, match=r"lacks layers.7.weight as a matrix"):
        load_head(tmp_path / "bad.pth")
    torch.save({name: value for name, value in state.items() if "2.bias" not in name}, tmp_path / "bad.pth")
    with pytest.raises(RewardError, match=r"bad.pth: lacks 1.bias"):
        load_head(tmp_path / "bad.pth")
    torch.save({**state, "layers.9.weight": torch.ones(1)}, tmp_path / "bad.pth")
    with pytest.raises(RewardError, match=r"has unknown layers.9.weight"):
        load_head(tmp_path / "bad.pth")
    two = nn.Linear(16, 2)
    torch.save(two.state_dict(), tmp_path / "bad.pth")
    with pytest.raises(RewardError, match="the last layer has 2 outputs"):
        load_head(tmp_path / "bad.pth")
