"""MPS: a tiny CLIP and cross model in the published layout, against a second implementation by explicit loops."""

import math

import pytest
import torch
from contract import check_contract, smooth_images
from safetensors.torch import load_file, save_file
from tiny_towers import write_clip_tokenizer
from torch import nn

from rewards import RewardError, load_reward
from rewards.backbones.mps_cross import CrossModel
from rewards.mps import OVERALL, VIT_H, Mps

CONTEXT, WIDTH, HEADS, HEAD, INNER = 77, 32, 2, 8, 64
TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": WIDTH}
TINY = {
    "text_config": TOWER | {"hidden_size": 16, "intermediate_size": 32, "eos_token_id": 2},
    "vision_config": TOWER | {"hidden_size": 24, "intermediate_size": 48, "image_size": 32, "patch_size": 16},
    "projection_dim": WIDTH,
}
PROMPTS = ["a red circle", "two blue squares and a cat", "a photo of a dog"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Random weights under the names of the published copy, with CLIP's tokenizer beside them."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("mps")
    both = nn.ModuleDict(
        {"model": CLIPModel(CLIPConfig(**TINY)), "cross_model": CrossModel(WIDTH, 2, HEADS, HEAD, INNER)}
    )
    generator = torch.Generator().manual_seed(0)
    for name, value in both.named_parameters():
        if value.dim() > 1:
            scale = 0.5 if "embedding" in name else 1.5 * value[0].numel() ** -0.5
            value.data = torch.randn(value.shape, generator=generator) * scale
    both["model"].logit_scale.data.fill_(math.log(90.0))
    save_file(
        {f"mps.{name}": value.contiguous() for name, value in both.state_dict().items()}, path / "model.safetensors"
    )
    write_clip_tokenizer(path)
    return path


@pytest.fixture
def load(directory, monkeypatch):
    monkeypatch.setattr(Mps, "architecture", TINY)
    return lambda **options: load_reward("mps", **{"weights": directory, "tokenizer": directory} | options)


def normalise(vector, weight):
    return (vector - vector.mean()) / (vector.var(correction=0) + 1e-5).sqrt() * weight


def rotated(vector, place):
    """Rotate the pairs (i, i + half), each by its own speed."""
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = place * 10000 ** (-2 * i / len(vector))
        out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
    return out


def attention(queries, keys, values):
    """One query after another, head by head; keys and values are shared."""
    rows = []
    for query in queries:
        heads = []
        for head in query.split(HEAD):
            weights = torch.stack([head @ key for key in keys]) / math.sqrt(HEAD)
            weights = weights.exp() / weights.exp().sum()
            heads.append(sum(w * value for w, value in zip(weights, values, strict=True)))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def swiglu(hidden):
    values, gate = hidden[..., : hidden.shape[-1] // 2], hidden[..., hidden.shape[-1] // 2 :]
    return values * gate / (1 + (-gate).exp())


def cross_by_hand(state, tokens, words):
    for layer in range(2):
        w = {k.removeprefix(f"layers.{layer}.0.fn."): v for k, v in state.items() if k.startswith(f"layers.{layer}.0")}
        x = torch.stack([normalise(token, w["norm.weight"]) for token in tokens])
        keys, values = (words @ w["to_kv.weight"].T).split(HEAD, dim=-1)
        seen = attention(x @ w["to_q.weight"].T, keys, values) @ w["to_out.weight"].T
        tokens = tokens + seen + swiglu(x @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = {k.removeprefix(f"layers.{layer}.1.fn."): v for k, v in state.items() if k.startswith(f"layers.{layer}.1")}
        x = torch.stack([normalise(token, w["norm.weight"]) for token in tokens])
        fused = x @ w["fused_attn_ff_proj.weight"].T
        q, k, v, hidden = fused.split((HEADS * HEAD, HEAD, HEAD, 2 * INNER), dim=-1)
        q = torch.stack([torch.cat([rotated(h, i) for h in row.split(HEAD)]) for i, row in enumerate(q)])
        k = torch.stack([rotated(row, i) for i, row in enumerate(k)])
        tokens = tokens + attention(q, k, v) @ w["attn_out.weight"].T + swiglu(hidden) @ w["ff_out.1.weight"].T
    return tokens


def by_hand(reward, directory, images, threshold, condition=OVERALL):
    """The authors' evaluation: one pair at a time, positions after the end token included."""
    from transformers import AutoTokenizer

    tokenizer, clip = AutoTokenizer.from_pretrained(directory), reward.model
    state = {
        k.removeprefix("mps.cross_model."): v.double() for k, v in load_file(directory / "model.safetensors").items()
    }
    scores, kept = [], []
    for image, prompt in zip(images, PROMPTS, strict=True):
        ids = tokenizer(
            [prompt, condition], padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        with torch.no_grad():
            out = clip.text_model(input_ids=ids["input_ids"])
            text, conditions = clip.text_projection(out.last_hidden_state).double()
            end = ids["input_ids"][0].tolist().index(49407)
            pixels = reward.preprocess(image[None]).to(out.last_hidden_state.dtype)
            vision = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)[0].double()
        closeness = torch.tensor([max((t @ c).item() for c in conditions) for t in text])
        keep = closeness / closeness.max() > threshold
        kept.append(int(keep.sum()))
        first = cross_by_hand(state, vision, text[keep])[0]
        scores.append(90 * torch.cosine_similarity(first, text[end], dim=0).item())
    return scores, kept


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_score_is_that_of_the_definition(load, directory, threshold):
    images = (smooth_images(3, 32, 32) * 255).round() / 255
    reward = load(threshold=threshold)
    expected, kept = by_hand(reward, directory, images, threshold)
    found = reward(images, prompts=PROMPTS)
    assert found.tolist() == pytest.approx(expected, abs=2e-3) and found.std() > 1
    assert 0 < min(kept) and (max(kept) < CONTEXT or threshold < 0.5)
    assert reward.version == f"overall, threshold {threshold:g}"


def test_the_condition_and_the_threshold_change_the_score(load, directory):
    images = smooth_images(3, 32, 32)
    overall = load(threshold=0.7)(images, prompts=PROMPTS)
    other = load(threshold=0.7, condition="circle")
    assert (other(images, prompts=PROMPTS) - overall).abs().max() > 0.1
    assert other(images, prompts=PROMPTS).tolist() == pytest.approx(
        by_hand(other, directory, images, 0.7, "circle")[0], abs=0.05
    )
    assert other.version == "condition 'circle', threshold 0.7"


def test_contract(load):
    """Among others, that a score does not depend on its neighbours, as it does in the authors' training code."""
    check_contract(load(), atol=1e-3, half_atol=12.0, long_prompt="cat " * 76)


def test_prompts_are_read_once(load, monkeypatch):
    reward = load()
    calls = []
    read = Mps._read
    monkeypatch.setattr(Mps, "_read", lambda self, texts: calls.append(texts[:-1]) or read(self, texts))
    images = smooth_images(3)
    first = reward(images, prompts=["a", "b", "a"])
    assert reward.matrix(images, ["a", "c"])[0, 0] == pytest.approx(first[0].item(), abs=1e-4)
    assert calls == [["a", "b"], ["c"]]
    reward.double()(images[:1], prompts=["a"])
    assert calls[2:] == [["a"]]


def test_files_of_other_models_are_refused(load, directory, tmp_path):
    state = {k.removeprefix("mps."): v for k, v in load_file(directory / "model.safetensors").items()}
    extra = {"model.text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(state | extra, tmp_path / "plain.pt")
    images = smooth_images(2)
    plain = load(weights=tmp_path / "plain.pt")(images, prompts=PROMPTS[:2])
    assert torch.equal(plain, load()(images, prompts=PROMPTS[:2]))
    del state["cross_model.layers.1.1.fn.attn_out.weight"]
    save_file(state | {"rm.weight": torch.ones(1)}, tmp_path / "short.safetensors")
    with pytest.raises(RewardError, match="lacks cross_model.layers.1.1.fn.attn_out.weight; has unknown rm.weight"):
        load(weights=tmp_path / "short.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "short.safetensors")
    with pytest.raises(RewardError, match="lacks cross_model.layers.0.0.fn.to_q.weight; it is not a model of MPS"):
        load(weights=tmp_path / "short.safetensors")
    with pytest.raises(RewardError, match="threshold is 1.0; a number below 1"):
        load(threshold=1.0)


def test_the_real_architecture_has_the_published_sizes():
    """Names and shapes, without memory for the numbers."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**VIT_H))
        cross = CrossModel(1024, 4, 16, 64, 4096)
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441, "as open_clip's ViT-H-14"
    shapes = {name: tuple(value.shape) for name, value in cross.state_dict().items()}
    assert shapes["layers.3.0.fn.to_kv.weight"] == (128, 1024) and shapes["layers.0.0.fn.ff.0.weight"] == (8192, 1024)
    assert shapes["layers.3.1.fn.fused_attn_ff_proj.weight"] == (1024 + 64 + 64 + 8192, 1024)
    assert shapes["layers.2.1.fn.rotary_emb.inv_freq"] == (32,) and shapes["layers.2.1.fn.norm.bias"] == (1024,)
    again = CrossModel.like({f"x.{name}": value for name, value in cross.state_dict().items()}, "x.")
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == shapes
