"""CLIP-I and DINO-I: tiny towers, against the mean over pairs worked out one by one."""

import pytest
import torch
from contract import check_contract, smooth_images
from tiny_towers import OPENAI_IMAGES, write_hf_clip, write_images, write_vit

from rewards import RewardError, load_reward
from rewards.backbones.hf import features

NAMES = ("clip-i", "dino-i")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    path = tmp_path_factory.mktemp("references")
    for folder in ("clip", "dino"):
        (path / folder).mkdir()
    return {"clip-i": path / "clip", "dino-i": path / "dino"}


@pytest.fixture(scope="module")
def models(directories):
    return {"clip-i": write_hf_clip(directories["clip-i"]), "dino-i": write_vit(directories["dino-i"])}


@pytest.fixture
def load(directories, models):
    return lambda name, **options: load_reward(name, weights=directories[name], **options)


def embed(name, model, images):
    """By transformers' model alone, for images that need no resizing."""
    mean, std = (
        ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
        if name == "clip-i"
        else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        if name == "clip-i":
            return features(model.get_image_features(pixel_values=pixels))
        return model(pixel_values=pixels).last_hidden_state[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_mean_cosine_over_the_references(name, load, models):
    images = (smooth_images(3, 32, 32) * 255).round() / 255
    references = [(smooth_images(count, 32, 32, seed=count) * 255).round() / 255 for count in (1, 2, 5)]
    media = embed(name, models[name], images)
    expected = [
        sum(torch.cosine_similarity(media[i], embed(name, models[name], image[None])[0], dim=0) for image in row)
        / len(row)
        for i, row in enumerate(references)
    ]
    found = load(name)(images, references=references)
    assert found.tolist() == pytest.approx([value.item() for value in expected], abs=1e-5)
    assert found.std() > 1e-4
    same = load(name)(images, references=[image[None] for image in images])
    assert same.tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_contract(name, load):
    check_contract(load(name), half_atol=2e-2, spread=1e-4)


def test_shared_references_are_embedded_once_and_in_micro_batches(load, monkeypatch):
    reward = load("dino-i", batch_size=4)
    images, shared, other = smooth_images(4), smooth_images(6, seed=1), smooth_images(2, 60, 40, seed=2)
    expected = [
        reward(images[i : i + 1], references=[row]).item() for i, row in enumerate((shared, shared, other, shared))
    ]
    calls = []
    encode = type(reward).encode_media
    monkeypatch.setattr(type(reward), "encode_media", lambda self, m: calls.append(len(m)) or encode(self, m))
    found = reward(images, references=[shared, shared, other, shared])
    assert calls == [4, 2, 2, 4], "six of one size, two of another, then the media"
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dino_of_the_second_version(tmp_path, kind):
    import transformers

    names = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = getattr(transformers, names[kind] + "Config")(**tower)
    model = getattr(transformers, names[kind] + "Model")(config).eval()
    model.save_pretrained(tmp_path)
    write_images(
        tmp_path, OPENAI_IMAGES | {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}}
    )
    reward = load_reward("dino-i", weights=tmp_path)
    images = (smooth_images(2, 36, 36) * 255).round() / 255
    pixels = reward.preprocess(images)
    with torch.no_grad():
        expected = torch.cosine_similarity(*model(pixel_values=pixels).pooler_output, dim=0)
    found = reward(images[:1], references=[images[1:]])
    assert found.item() == pytest.approx(expected.item(), abs=1e-5), "the pooled output is the normalised [CLS]"


def test_wrong_models_and_references_are_refused(tmp_path, load):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="is a model of type 'bert'; allowed: dinov2, dinov2_with_registers, vit"):
        load_reward("dino-i", weights=tmp_path)
    reward = load("clip-i")
    with pytest.raises(RewardError, match="2 sets of references for 3 media"):
        reward(smooth_images(3), references=[smooth_images(1)] * 2)
    with pytest.raises(RewardError, match=r"references\[0\] has shape \[3, 48, 40\]"):
        reward(smooth_images(1), references=[smooth_images(1)[0]])
    assert not any(name.startswith("model.text") for name, _ in reward.encoder.named_parameters())
    assert reward.version == reward.source and type(reward).version == "ViT-B/16"
