"""PickScore: a tiny CLIP of transformers in the published layout."""

import json
import math

import pytest
import torch
from contract import check_contract, smooth_images
from tiny_towers import write_hf_clip

from rewards import RewardError, load_reward
from rewards.pickscore import PROCESSOR, PickScore

CAPTIONS = ["a red circle", "two blue squares", "a photo of a cat"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """As the published checkpoint: the old `eos_token_id` 2, and a logit scale of 100 or so."""
    path = tmp_path_factory.mktemp("pickscore")
    model = write_hf_clip(path, eos_token_id=2)
    model.logit_scale.data.fill_(math.log(98.0))
    model.save_pretrained(path)
    return path


@pytest.fixture
def pickscore(directory):
    return load_reward("pickscore", weights=directory)


def by_hand(directory, images, captions):
    """What the authors' script does, by transformers' own processor and model."""
    import transformers
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(directory).eval()
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    # Since version 5 the processor that works through PIL has a name of its own.
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = processor(**settings)([i.mul(255).byte() for i in images], return_tensors="pt")["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(directory)(
        captions, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
    return output.logits_per_text.diagonal()


def test_score_is_the_scaled_cosine_of_the_authors_script(directory):
    images = (smooth_images(3, 50, 70) * 255).round() / 255
    expected = by_hand(directory, images, CAPTIONS)
    reference = load_reward("pickscore", weights=directory, preprocessing="reference")
    assert expected.std() > 0.1
    assert torch.allclose(reference(images, prompts=CAPTIONS), expected, atol=2e-3)
    assert (load_reward("pickscore", weights=directory)(images, prompts=CAPTIONS) - expected).abs().max() < 1.0


def test_scale_is_the_checkpoints_or_the_users(directory, pickscore):
    images = smooth_images(3)
    scores = pickscore(images, prompts=CAPTIONS)
    assert pickscore.scale == pytest.approx(98.0, rel=1e-6) and pickscore.version == "v1"
    assert pickscore.range == pytest.approx((-98.0, 98.0), rel=1e-6)
    cosine = load_reward("pickscore", weights=directory, scale=1.0)
    assert torch.allclose(cosine(images, prompts=CAPTIONS), scores / 98, atol=1e-6)
    assert cosine.version == "v1, scale 1" and cosine.range == (-1.0, 1.0)
    assert pickscore.half().scale == pytest.approx(98.0, rel=1e-6)


def test_preferences_are_a_softmax_over_the_images(pickscore):
    images = smooth_images(4)
    chosen = pickscore.preferences(images, "a red circle")
    scores = pickscore(images, prompts=["a red circle"] * 4).double()
    weights = [math.exp(value - scores.max().item()) for value in scores.tolist()]
    assert chosen.tolist() == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-5)
    pair = pickscore.preferences(images[:2], "a red circle")
    margin = pickscore.pairwise(images[:1], images[1:2], prompts=["a red circle"])
    assert pair[0].item() == pytest.approx(torch.sigmoid(margin).item(), abs=1e-5)


def test_contract(pickscore):
    check_contract(pickscore, atol=1e-3, half_atol=3.0, long_prompt="cat " * 76)


def test_images_are_cropped_whatever_the_processor_beside_the_weights_says(directory, tmp_path):
    import shutil

    shutil.copytree(directory, tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text())
    settings["resample"] = 2
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps(settings))
    images = smooth_images(3)
    scores = [
        load_reward("pickscore", weights=path)(images, prompts=CAPTIONS) for path in (directory, tmp_path / "copy")
    ]
    assert torch.equal(*scores)


def test_wrong_weights_are_refused(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    state = load_file(directory / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match="lacks weights of CLIPModel: visual_projection.weight"):
        load_reward("pickscore", weights=tmp_path)
    with pytest.raises(RewardError, match="no such directory|cannot load"):
        load_reward("pickscore", weights=tmp_path / "none")
    facts = PickScore(weights=directory).facts
    assert facts.files[0].repo == "yuvalkirstain/PickScore_v1" and PROCESSOR in PickScore.source
    assert facts.source == str(directory)
