"""Encoders of open_clip and transformers: against the libraries' own models and processors, and each other."""

import json

import pytest
import torch
from contract import check_contract, smooth_images
from tiny_towers import write_align, write_clip_tokenizer, write_hf_clip, write_siglip

from rewards import RewardError, load_reward
from rewards.backbones.hf_encoder import load_hf_encoder
from rewards.backbones.load import load_encoder

SENTENCES = ["a photo of a cat", "Two DOGS, it's 10 o'clock!", "café  naïve   10kg", "", "a red\ncircle"]
CAPTIONS = ["a red circle", "two blue square", "a cat", "a dog on a table", "", "a photo of a dog", "red", "two cat"]


@pytest.fixture(scope="module")
def hf_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf-clip")
    return path, write_hf_clip(path)


def test_tokenizers_of_both_libraries_agree(tmp_path):
    import open_clip
    from transformers import CLIPTokenizer

    write_clip_tokenizer(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = open_clip.get_tokenizer("ViT-L-14-quickgelu")(SENTENCES)
    assert ours[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    for row, sentence in zip(ours.tolist(), SENTENCES, strict=True):
        ids = theirs(sentence)["input_ids"]
        assert row == ids + [0] * (77 - len(ids))
    assert theirs(["a", "a photo"], padding="max_length")["input_ids"][0] == [49406, 320] + [49407] * 75


@pytest.mark.parametrize("write", [write_hf_clip, write_siglip, write_align])
def test_cosine_is_that_of_the_model_and_its_own_processors(tmp_path, write):
    from transformers import AutoImageProcessor, AutoTokenizer

    from rewards.backbones.hf import features

    model = write(tmp_path)
    images = (smooth_images(3, 50, 70) * 255).round() / 255
    captions = ["a red circle", "two cat on a table", "a photo of a dog"]
    with torch.no_grad():
        pil = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False, backend="pil")
        pixels = pil([image.mul(255).byte() for image in images], return_tensors="pt")["pixel_values"]
        image = features(model.get_image_features(pixel_values=pixels))
        tokens = AutoTokenizer.from_pretrained(tmp_path)(captions, padding="max_length", return_tensors="pt")
        mask = {} if write is write_siglip else {"attention_mask": tokens["attention_mask"]}
        text = features(model.get_text_features(input_ids=tokens["input_ids"], **mask))
    expected = torch.cosine_similarity(image, text)
    assert expected.std() > 1e-3
    reward = load_reward("clip", weights=tmp_path, preprocessing="reference")
    assert torch.allclose(reward(images, prompts=captions), expected, atol=1e-5)
    assert reward.source == str(tmp_path) and reward.facts.range == (-1.0, 1.0)
    other = load_reward("clip", weights=tmp_path)(images, prompts=captions)
    assert (other - expected).abs().max() < 0.01


def test_two_libraries_give_one_number_for_the_same_weights(tmp_path, write_clip, images, captions):
    """A model of open_clip, its weights renamed for transformers by hand."""
    from safetensors.torch import load_file
    from tiny_towers import OPENAI_IMAGES, clip_config, write_images
    from transformers import CLIPModel

    write_clip(tmp_path / "open", context_length=77)
    state = load_file(tmp_path / "open" / "open_clip_model.safetensors")
    renamed = {"logit_scale": state["logit_scale"], "text_projection.weight": state["text_projection"].T.contiguous()}
    renamed["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    text, vision = "text_model.embeddings.", "vision_model.embeddings."
    renamed[text + "token_embedding.weight"] = state["token_embedding.weight"]
    renamed[text + "position_embedding.weight"] = state["positional_embedding"]
    renamed[vision + "class_embedding"] = state["visual.class_embedding"]
    renamed[vision + "patch_embedding.weight"] = state["visual.conv1.weight"]
    renamed[vision + "position_embedding.weight"] = state["visual.positional_embedding"]
    norms = {"text_model.final_layer_norm": "ln_final", "vision_model.pre_layrnorm": "visual.ln_pre"}
    norms["vision_model.post_layernorm"] = "visual.ln_post"
    for tower, blocks in [("text_model", "transformer.resblocks"), ("vision_model", "visual.transformer.resblocks")]:
        for layer in range(2):
            new, old = f"{tower}.encoder.layers.{layer}", f"{blocks}.{layer}"
            norms |= {f"{new}.layer_norm{i}": f"{old}.ln_{i}" for i in (1, 2)}
            norms |= {f"{new}.mlp.fc1": f"{old}.mlp.c_fc", f"{new}.mlp.fc2": f"{old}.mlp.c_proj"}
            norms[f"{new}.self_attn.out_proj"] = f"{old}.attn.out_proj"
            for kind in ("weight", "bias"):
                parts = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
                renamed |= {f"{new}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
    renamed |= {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in norms.items() for kind in ("weight", "bias")}
    model = CLIPModel(clip_config(intermediate_size=128))
    config = model.config
    config.text_config.intermediate_size = 128
    model = CLIPModel(config)
    model.load_state_dict(renamed)
    model.save_pretrained(tmp_path / "hf")
    write_clip_tokenizer(tmp_path / "hf")
    write_images(tmp_path / "hf", OPENAI_IMAGES)
    scores = [load_reward("clip", weights=tmp_path / kind)(images, prompts=captions) for kind in ("open", "hf")]
    assert torch.allclose(*scores, atol=1e-5) and scores[0].std() > 0.01


@pytest.mark.parametrize("write", [write_siglip, write_align])
def test_contract(tmp_path, write):
    write(tmp_path)
    reward = load_reward("clip", weights=tmp_path)
    check_contract(reward, prompts=CAPTIONS, long_prompt="a cat on a table " * 20, half_atol=0.05)


def test_clip_of_transformers_keeps_the_contract(hf_clip):
    check_contract(load_reward("clip", weights=hf_clip[0]), half_atol=0.03, long_prompt="cat " * 76)


def test_padding_is_masked_or_not_as_in_training(tmp_path):
    write_siglip(tmp_path / "siglip")
    write_align(tmp_path / "align")
    for name in ("siglip", "align"):
        encoder = load_hf_encoder(tmp_path / name)
        with torch.no_grad():
            together = encoder.embed_texts(["red", "a cat on a table"])
            assert torch.allclose(encoder.embed_texts(["red"]), together[:1], atol=1e-5)
    assert load_hf_encoder(tmp_path / "siglip").context == 12
    assert load_hf_encoder(tmp_path / "align").context == 64, "of 128 positions, as its processor"
    assert encoder.tokenize(["red", "red cat", "cat " * 70])[1] == [3, 4, 72]


def test_old_checkpoints_pool_at_the_highest_token(tmp_path, hf_clip):
    """`eos_token_id` 2, as in PickScore's configuration, gives the same as the true id."""
    old = write_hf_clip(tmp_path, eos_token_id=2)
    old.load_state_dict(hf_clip[1].state_dict())
    old.save_pretrained(tmp_path)
    with torch.no_grad():
        texts = [load_encoder(path).embed_texts(SENTENCES) for path in (tmp_path, hf_clip[0])]
    assert torch.equal(*texts) and texts[0].std(dim=0).min() > 0.01


def test_a_weights_file_for_an_architecture_of_open_clip(tmp_path, clip_directory, images, captions):
    import open_clip
    from safetensors.torch import load_file

    config = json.loads((clip_directory / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-file-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-file-test.json")
    expected = load_reward("clip", weights=clip_directory)(images, prompts=captions)
    state = load_file(clip_directory / "open_clip_model.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "state.pt")
    as_published = state | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16)}
    torch.save({name: value.half() for name, value in as_published.items()}, tmp_path / "half.pt")
    whole = load_reward("clip", weights=tmp_path / "state.pt", model="tiny-file-test")
    assert torch.equal(whole(images, prompts=captions), expected)
    half = load_reward("clip", weights=tmp_path / "half.pt", model="tiny-file-test")
    assert 0 < (half(images, prompts=captions) - expected).abs().max() < 1e-3
    with pytest.raises(RewardError, match="is a file; also give model="):
        load_encoder(tmp_path / "state.pt")
    del state["visual.proj"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(RewardError, match="half.pt: lacks visual.proj: these are the weights of another model"):
        load_reward("clip", weights=tmp_path / "half.pt", model="tiny-file-test")


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_the_text_tower_may_be_dropped(hf_clip, clip_directory, images, layout):
    path = clip_directory if layout == "open_clip" else hf_clip[0]
    whole, half = load_encoder(path), load_encoder(path).without_texts()
    with torch.no_grad():
        assert torch.equal(half.embed_media(images), whole.embed_media(images))
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in (whole, half)]
    assert sizes[1] < 0.1 * sizes[0]


def test_wrong_models_are_refused(tmp_path, hf_clip):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="the model type 'bert' is not supported; allowed: align, clip, siglip"):
        load_encoder(tmp_path)
    with pytest.raises(RewardError, match="remove model= and pretrained="):
        load_encoder(hf_clip[0], model="ViT-B-32")
    with pytest.raises(RewardError, match="weights 'no/such': no such local directory or file; as a hub id"):
        load_encoder("no/such")
    (hf_clip[0] / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    try:
        with pytest.raises(RewardError, match="cannot read preprocessor_config.json"):
            load_encoder(hf_clip[0])
    finally:
        (tmp_path / "preprocessor_config.json").rename(hf_clip[0] / "preprocessor_config.json")
