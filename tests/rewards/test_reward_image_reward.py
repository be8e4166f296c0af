"""ImageReward on a tiny BLIP in the published layout, against transformers' own ViT and BERT."""

import pytest
import torch
from contract import check_contract, smooth_images
from safetensors.torch import save_file
from torch import nn

from rewards import RewardError, load_reward
from rewards.backbones.blip import Blip
from rewards.image_reward import MEAN, STD

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of red blue yellow green two three circle square squares star ring cat dog"
    " and cyan pink cross triangles left ##s ##ling dar long"
).split()
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96}
TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 160}


def reference_towers():
    """transformers' ViT, and its BERT with cross-attention; large weights, so that everything matters."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(**VISION, image_size=32, patch_size=8, layer_norm_eps=1e-6), add_pooling_layer=False
    ).eval()
    config = BertConfig(
        **TEXT,
        vocab_size=len(WORDS) + 2,
        max_position_embeddings=64,
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers has cross-attention in decoders only; the mask below undoes the causality
        add_cross_attention=True,
    )
    config.encoder_hidden_size = VISION["hidden_size"]
    attention = BertModel(config, add_pooling_layer=False)
    for layer in attention.encoder.layer:  # the image is narrower than the text
        for name in ("key", "value"):
            setattr(layer.crossattention.self, name, nn.Linear(VISION["hidden_size"], TEXT["hidden_size"]))
    bert = attention.eval()
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.zero_()
        for tower in (vit, bert):
            for name, parameter in tower.named_parameters():
                if "token_type" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.15)
    return vit, bert


def published_state(vit, bert):
    """The two towers and a random reward head under the names of ImageReward.pt."""
    state = {}
    old = vit.state_dict()
    new = "blip.visual_encoder."
    state[f"{new}cls_token"], state[f"{new}pos_embed"] = (
        old["embeddings.cls_token"],
        old["embeddings.position_embeddings"],
    )
    for end in ("weight", "bias"):
        state[f"{new}patch_embed.proj.{end}"] = old[f"embeddings.patch_embeddings.projection.{end}"]
        state[f"{new}norm.{end}"] = old[f"layernorm.{end}"]
        for i, layer in enumerate(vit_layers(vit)):
            parts = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            linear = {key: getattr(module, end) for key, module in vit_linears(parts).items()}
            block = f"{new}blocks.{i}."
            state[f"{block}attn.qkv.{end}"] = torch.cat([linear["query"], linear["key"], linear["value"]])
            for key, name in {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}.items():
                state[f"{block}{name}.{end}"] = linear[key]
            state[f"{block}norm1.{end}"] = getattr(layer.layernorm_before, end)
            state[f"{block}norm2.{end}"] = getattr(layer.layernorm_after, end)
    for name, value in bert.state_dict().items():
        if "token_type" not in name:
            state[f"blip.text_encoder.{name}"] = value
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    state["blip.vision_proj.weight"], state["blip.text_proj.weight"] = torch.zeros(4, 64), torch.zeros(4, 128)
    sizes = [TEXT["hidden_size"], 1024, 128, 64, 16, 1]
    for i, index in enumerate((0, 2, 4, 6, 7)):
        state[f"mlp.layers.{index}.weight"] = torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5
        state[f"mlp.layers.{index}.bias"] = torch.randn(sizes[i + 1]) * 0.1
    return {name: value.detach().clone() for name, value in state.items()}


def vit_layers(vit):
    return vit.encoder.layer if hasattr(vit, "encoder") else vit.layers


def vit_linears(parts):
    """The six linear layers of a ViT block, in the order in which every version of transformers lists them."""
    names = ("query", "key", "value", "out", "up", "down")
    assert len(parts) == len(names), sorted(parts)
    return dict(zip(names, parts.values(), strict=True))


@pytest.fixture(scope="module")
def towers():
    return reference_towers()


@pytest.fixture(scope="module")
def directory(towers, tmp_path_factory):
    path = tmp_path_factory.mktemp("image-reward")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.save(published_state(*towers), path / "ImageReward.pt")
    return path


@pytest.fixture(scope="module")
def reward(directory):
    return load_reward("image-reward", weights=directory, device="cpu")


def by_transformers(vit, bert, state, pixels, ids, mask):
    """The published formula through transformers' towers and matrix products."""
    with torch.no_grad():
        image = vit(pixels).last_hidden_state
        both_ways = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1).bool()
        hidden = bert(ids, attention_mask=both_ways, encoder_hidden_states=image, use_cache=False).last_hidden_state[
            :, 0
        ]
        for index in (0, 2, 4, 6, 7):
            hidden = hidden @ state[f"mlp.layers.{index}.weight"].T + state[f"mlp.layers.{index}.bias"]
    return (hidden[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_score_is_the_published_formula_over_transformers_towers(reward, towers, directory):
    images = (smooth_images(4, 32, 32) * 255).round() / 255
    prompts = ["a photo of a cat", "darling", "two blue squares and a red circle", ""]
    index = {word: i for i, word in enumerate(WORDS)}
    rows = [
        [index[word] for word in ["[CLS]", *tokens.split(), "[SEP]"]]
        for tokens in ("a photo of a cat", "dar ##ling", "two blue squares and a red circle", "")
    ]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (reward.preprocess.mean, reward.preprocess.std))
    expected = by_transformers(*towers, published_state_of(directory), (images - mean) / std, ids, ids != 0)
    scores = reward(images, prompts=prompts)
    assert torch.allclose(scores, expected, atol=2e-5)
    assert scores.std() > 0.05


def published_state_of(directory):
    return torch.load(directory / "ImageReward.pt", weights_only=True)


def test_text_attends_both_ways_and_padding_is_not_seen(reward, towers):
    blip = reward.blip
    image = blip.image_context(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[2, 8, 5, 9, 3, 0, 0]])
    mask = ids != 0
    first = blip(ids, mask, image)[0, 0]
    changed = ids.clone()
    changed[0, 3] = 10
    assert (blip(changed, mask, image)[0, 0] - first).abs().max() > 1e-3, "[CLS] sees later words"
    changed = ids.clone()
    changed[0, 6] = 10
    assert torch.allclose(blip(changed, mask, image)[0, 0], first, atol=1e-6)


def test_contract(reward):
    check_contract(reward, half_atol=0.15, long_prompt="red " * 34, atol=2e-5)


def test_the_head_stays_in_float32(reward, directory):
    half = load_reward("image-reward", weights=directory, dtype="bf16", device="cpu")
    assert half.blip.visual_encoder.norm.weight.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == torch.float32 and torch.equal(half.head[0].weight, reward.head[0].weight)
    assert half.double().head[0].weight.dtype == torch.float64


def test_the_constants_are_the_published_ones(reward):
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
    assert reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(WORDS), len(WORDS) + 1]
    assert reward.tokenizer.bos_token == "[DEC]"
    assert reward.tokenizer(["red"])["input_ids"] == [[2, WORDS.index("red"), 3]], "[CLS] stays [CLS]"


def test_long_prompts_are_cut_at_35_tokens(directory):
    reward = load_reward("image-reward", weights=directory, device="cpu")
    image = smooth_images(1)
    with pytest.warns(UserWarning, match="image-reward: 1 of 1 prompts exceed 35 tokens and are cut there"):
        cut = reward(image, prompts=["red " * 33 + "dog"])
    assert torch.allclose(cut, reward(image, prompts=["red " * 33]), atol=1e-6)
    reward(image, prompts=["blue " * 34])
    assert reward.truncated_prompts == 2


def test_images_are_encoded_once_for_all_prompts(reward, monkeypatch):
    calls = []
    encode = Blip.image_context
    monkeypatch.setattr(Blip, "image_context", lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels))
    assert reward.matrix(smooth_images(3), ["red", "blue", "a cat", "a dog"]).shape == (3, 4)
    assert calls == [3]


def test_safetensors_and_reference_preprocessing(reward, directory, tmp_path):
    save_file(published_state_of(directory), tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text((directory / "vocab.txt").read_text())
    other = load_reward("image-reward", weights=tmp_path / "model.safetensors", preprocessing="reference")
    images, prompts = smooth_images(4), ["a cat", "a dog", "red", "blue"]
    difference = (other(images, prompts=prompts) - reward(images, prompts=prompts)).abs().max()
    assert 0 < difference < 0.05


def test_wrong_weights_are_refused_with_what_is_wrong(directory, tmp_path):
    state = published_state_of(directory)
    (tmp_path / "vocab.txt").write_text((directory / "vocab.txt").read_text())
    cases = [
        ({"mlp.layers.7.bias": None}, "lacks mlp.layers.7.bias"),
        ({"blip.extra.weight": torch.zeros(1)}, "has unknown blip.extra.weight"),
        ({"mlp.layers.0.weight": torch.zeros(8, 8)}, r"mlp.layers.0.weight \[8, 8\] instead of \[1024, 128\]"),
        (
            {"blip.visual_encoder.pos_embed": None},
            "not the weights of a BLIP: blip.visual_encoder.pos_embed is missing",
        ),
    ]
    for change, message in cases:
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "ImageReward.pt")
        with pytest.raises(RewardError, match=message):
            load_reward("image-reward", weights=tmp_path)
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(RewardError, match="word embeddings, the tokenizer with .* give tokenizer=PATH"):
        load_reward("image-reward", weights=tmp_path)
    with pytest.raises(RewardError, match="no such file; give ImageReward.pt or its directory"):
        load_reward("image-reward", weights=tmp_path / "nowhere")
    with pytest.raises(RewardError, match="preprocessing 'pil' is unknown"):
        load_reward("image-reward", weights=tmp_path, preprocessing="pil")
