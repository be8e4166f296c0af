"""HPS v2 and v2.1: a tiny CLIP of open_clip, saved as the published checkpoints are."""

import json

import pytest
import torch
from contract import check_contract, smooth_images
from golden_data import golden_file
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards import RewardError, load_reward
from rewards.hps import Hps

CAPTIONS = ["a red circle", "two blue squares", "a photo of a cat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, clip_directory):
    """The two published files, and the tiny architecture under a name of open_clip's."""
    import open_clip

    path = tmp_path_factory.mktemp("hps")
    config = json.loads((clip_directory / "open_clip_config.json").read_text())["model_cfg"]
    (path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(path / "tiny-hps.json")
    state = load_file(clip_directory / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "name": "x", "state_dict": state}, path / "HPS_v2.1_compressed.pt")
    state["visual.proj"] = state["visual.proj"].flip(0).contiguous()
    torch.save({"state_dict": state}, path / "HPS_v2_compressed.pt")
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(Hps, "architecture", "tiny-hps")


def by_hand(directory, images, captions):
    """The authors' steps: open_clip's own padding transform, and the diagonal of the cosines."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{directory}").eval()
    transform = open_clip.image_transform(32, is_train=False, resize_mode="longest", fill_color=0)
    pixels = torch.stack([transform(image) for image in images])
    tokens = open_clip.get_tokenizer(f"local-dir:{directory}")(captions)
    with torch.no_grad():
        return (model.encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T).diagonal()


def pictures():
    """A wide, a high and a square one; noise, so that padding and cropping differ."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(48, 90), (70, 41), (64, 64)]
    rows = [torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy() for size in sizes]
    return [Image.fromarray(row).resize((row.shape[1] * 2, row.shape[0] * 2)) for row in rows]


def test_score_is_the_bare_cosine_of_padded_images(checkpoint, clip_directory):
    expected = by_hand(clip_directory, pictures(), CAPTIONS)
    reward = load_reward("hps", weights=checkpoint, preprocessing="reference")
    found = reward(pictures(), prompts=CAPTIONS)
    assert torch.allclose(found, expected, atol=1e-6) and expected.std() > 1e-3
    assert (load_reward("hps", weights=checkpoint)(pictures(), prompts=CAPTIONS) - expected).abs().max() < 2e-3
    cropped = load_reward("clip", weights=clip_directory, preprocessing="reference")(pictures(), prompts=CAPTIONS)
    assert (cropped - expected)[:2].abs().min() > 1e-4 and torch.allclose(cropped[2], expected[2], atol=1e-6)


def test_geometry_on_the_authors_picture():
    import open_clip

    from rewards.backbones.preprocess import Preprocess
    from rewards.media import load_image

    image = Image.open(golden_file("hpsv2_demo_image.jpg")).convert("RGB")
    expected = open_clip.image_transform(224, is_train=False, resize_mode="longest", fill_color=0)(image)
    found = Preprocess(224, resize="longest", fill=0.0)(load_image(image)[None], "reference")[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_versions_are_different_weights_and_stand_in_the_facts(checkpoint):
    images = smooth_images(3)
    older, newer = (load_reward("hps", version=name, weights=checkpoint) for name in ("v2", "v2.1"))
    assert (older(images, prompts=CAPTIONS) - newer(images, prompts=CAPTIONS)).abs().min() > 1e-4
    assert [reward.facts.version for reward in (older, newer)] == ["v2", "v2.1"]
    assert [reward.facts.files[0].file for reward in (older, newer)] == [
        "HPS_v2_compressed.pt",
        "HPS_v2.1_compressed.pt",
    ]
    assert load_reward("hps", weights=checkpoint).version == "v2.1"
    with pytest.raises(RewardError, match="version 'v3' is unknown; .*allowed: v2, v2.1; v3 is 'hps-v3'"):
        load_reward("hps", version="v3")


def test_contract(checkpoint):
    check_contract(load_reward("hps", weights=checkpoint), half_atol=2e-2, long_prompt="cat " * 15)


def test_safetensors_with_the_same_names_and_a_wrong_file(checkpoint, tmp_path):
    state = torch.load(checkpoint / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "hps.safetensors")
    images = smooth_images(3)
    half = load_reward("hps", weights=tmp_path / "hps.safetensors")(images, prompts=CAPTIONS)
    assert torch.allclose(half, load_reward("hps", weights=checkpoint)(images, prompts=CAPTIONS), atol=2e-3)
    del state["ln_final.bias"]
    save_file({**state, "extra": torch.ones(1)}, tmp_path / "hps.safetensors")
    with pytest.raises(RewardError, match="lacks ln_final.bias; has unknown extra"):
        load_reward("hps", weights=tmp_path / "hps.safetensors")
    with pytest.raises(RewardError, match="no such file; give HPS_v2.1_compressed.pt"):
        load_reward("hps", weights=tmp_path)


def test_the_real_architecture_has_plain_gelu():
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    assert not config.get("quick_gelu", False) and config["text_cfg"].get("context_length") == 77
    assert (config["embed_dim"], config["vision_cfg"]["width"], config["vision_cfg"]["layers"]) == (1024, 1280, 32)
