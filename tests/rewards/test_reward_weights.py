"""Published weights: found, fetched, checked, read without running code; models of transformers."""

import json

import pytest
import torch
from torch import nn

from rewards import RewardError
from rewards.backbones.hf import load_pretrained
from rewards.backbones.weights import Weights, load_state, locate, read_state, sha256


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_given_files_and_directories(tmp_path):
    published = Weights("org/name", "head.pth", "abc")
    (tmp_path / "head.pth").write_bytes(b"x")
    assert locate(published, tmp_path) == locate(published, tmp_path / "head.pth") == tmp_path / "head.pth"
    assert str(published) == "org/name:head.pth@abc" and str(Weights("org/name", "a")) == "org/name:a"
    with pytest.raises(RewardError, match="no such file; give head.pth or its directory"):
        locate(published, tmp_path / "other.pth")


def test_files_of_another_host_are_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    folder = tmp_path / "org" / "name" / "abc"
    folder.mkdir(parents=True)
    (folder / "a+b.pth").write_bytes(b"weights")
    digest = sha256(folder / "a+b.pth")
    published = Weights("org/name", "a+b.pth", "abc", digest, host=f"file://{tmp_path}")
    with pytest.raises(RewardError, match="cannot fetch .* HF_HUB_OFFLINE forbids"):
        locate(published)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    path = locate(published)
    assert path.read_bytes() == b"weights" and path.is_relative_to(tmp_path / "cache")
    (folder / "a+b.pth").unlink()
    assert locate(published) == path, "from the cache"
    path.write_bytes(b"damaged")
    with pytest.raises(RewardError, match="SHA-256 is not that of org/name:a.b.pth@abc"):
        locate(published)
    path.unlink()
    with pytest.raises(RewardError, match="cannot fetch org/name:a.b.pth@abc: .*; or give weights=PATH"):
        locate(published)
    (folder / "a+b.pth").write_bytes(b"other")
    with pytest.raises(RewardError, match="cannot fetch .* invalid hash value"):
        locate(published)


def test_only_tensors_are_read(tmp_path):
    state = {"weight": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    assert read_state(tmp_path / "wrapped.pt")["weight"].equal(state["weight"])
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match="evil.pt: not readable as plain weights"):
        read_state(tmp_path / "evil.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(RewardError, match="holds no state dict"):
        read_state(tmp_path / "list.pt")


def test_every_difference_of_a_state_is_listed():
    layer = nn.Linear(2, 3)
    with pytest.raises(RewardError, match=r"x: lacks bias; has unknown extra; has other shapes for weight \[3, 3\]"):
        load_state(layer, {"weight": torch.ones(3, 3), "extra": torch.ones(1)}, "x")
    half = {"a.weight": torch.ones(3, 2).half(), "a.bias": torch.zeros(3), "drop": torch.zeros(1)}
    load_state(layer, half, "x", rename=lambda name: name.removeprefix("a.") if name != "drop" else None)
    assert layer.weight.dtype == torch.float32 and layer.weight.equal(torch.ones(3, 2))


@pytest.mark.parametrize("safe", [True, False])
def test_models_of_transformers_are_complete_or_refused(tmp_path, safe):
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **shape), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    if not safe:
        torch.save(state, tmp_path / "pytorch_model.bin")
        weights.unlink()
    loaded = load_pretrained("ViTModel", tmp_path, dtype=torch.float64, add_pooling_layer=False)
    assert loaded.dtype == torch.float64 and not loaded.training
    assert all(value.float().equal(own) for value, own in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(RewardError, match="lacks weights of ViTModel: pooler.dense.bias, pooler.dense.weight"):
        load_pretrained("ViTModel", tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    save_file(state, weights)
    with pytest.raises(
        RewardError, match=r"lacks weights of ViTModel: layers.0.mlp.fc1.bias, .*fc2.weight: it belongs"
    ):
        load_pretrained("ViTModel", tmp_path, dtype=torch.float32, add_pooling_layer=False)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(RewardError, match="cannot load ViTModel from"):
        load_pretrained("ViTModel", tmp_path, dtype=torch.float32)
    with pytest.raises(RewardError, match="no such directory"):
        load_pretrained("ViTModel", tmp_path / "none", dtype=torch.float32)
