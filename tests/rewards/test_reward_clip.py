"""CLIP rewards: a tiny real open_clip model through our loader."""

import json

import pytest
import torch
from contract import check_contract

from rewards import RewardError, load_reward
from rewards.bases.two_tower import unit
from rewards.clip import ClipReward


@pytest.fixture
def clip(clip_directory):
    return load_reward("clip", weights=str(clip_directory), device="cpu")


def by_hand(directory, images, captions):
    """Cosine by open_clip's functions alone, for images that need no resizing."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{directory}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{directory}")(captions)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        image = model.encode_image((images - mean) / std, normalize=True)
        return (image * model.encode_text(tokens, normalize=True)).sum(-1)


def test_score_is_the_cosine_that_open_clip_gives(clip, clip_directory, images, captions):
    exact = (images[..., :32, :32] * 255).round() / 255
    scores = clip(exact, prompts=captions)
    assert scores.dtype == torch.float32 and scores.shape == (8,)
    assert torch.allclose(scores, by_hand(clip_directory, exact, captions), atol=1e-6)
    assert scores.std() > 0.01


def test_kinds_differ_by_scale_clamp_and_prefix(clip, clip_directory, images, captions):
    cosine = clip(images, prompts=captions)
    assert cosine.min() > 0.1
    hundred = load_reward("clip", weights=str(clip_directory), kind="clipscore")
    assert torch.allclose(hundred(images, prompts=captions), 100 * cosine.clamp(min=0), atol=1e-4)
    assert hundred.range == (0.0, 100.0) and hundred.version == "clipscore, scale 100, prefix ''"
    hessel = load_reward("clip", weights=clip_directory, kind="hessel")
    prefixed = clip(images, prompts=["A photo depicts " + caption for caption in captions])
    assert torch.allclose(hessel(images, prompts=captions), 2.5 * prefixed.clamp(min=0), atol=1e-5)
    own = load_reward("clip", weights=clip_directory, kind="cosine", scale=10.0, prefix="A photo depicts ")
    assert torch.allclose(own(images, prompts=captions), 10 * prefixed, atol=1e-5)
    hundred.encoder.model.visual.proj.neg_()
    assert hundred(images, prompts=captions).tolist() == [0.0] * 8, "opposite embeddings are cut at zero"
    assert hessel.compare(torch.tensor([-0.5, 0.4])).tolist() == pytest.approx([0.0, 1.0])
    assert clip.facts.range == (-1.0, 1.0) and clip.facts.source == f"local-dir:{clip_directory}"


def test_reference_captions_make_the_harmonic_mean(clip, clip_directory, images, captions, tmp_path):
    known = {caption: ["a dog", f"one {caption}"] for caption in captions}
    reward = load_reward("ref-clipscore", weights=clip_directory, captions=known)
    prefixed = ["A photo depicts " + caption for caption in captions]
    first = 2.5 * clip(images, prompts=prefixed).clamp(min=0)
    texts = clip.prompt_embeddings
    nearest = [
        max((texts([mine]) @ texts(["A photo depicts " + other]).T).item() for other in known[caption])
        for mine, caption in zip(prefixed, captions, strict=True)
    ]
    expected = [2 / (1 / a + 1 / b) for a, b in zip(first.tolist(), nearest, strict=True)]
    assert reward(images, prompts=captions).tolist() == pytest.approx(expected, abs=1e-5)
    assert reward.range == pytest.approx((0.0, 5 / 3.5)) and reward.version.endswith("with reference captions")
    assert torch.allclose(reward.matrix(images, captions).diagonal(), torch.tensor(expected), atol=1e-5)
    (tmp_path / "captions.json").write_text(json.dumps(known))
    again = load_reward("ref-clipscore", weights=clip_directory, captions=tmp_path / "captions.json")
    assert torch.equal(again(images, prompts=captions), reward(images, prompts=captions))
    reward.encoder.model.visual.proj.neg_()
    assert reward(images, prompts=captions).tolist() == [0.0] * 8, "a CLIPScore of zero leaves nothing"
    with pytest.raises(RewardError, match="captions= has none for the prompt 'new', nor for 0 others"):
        reward(images[:1], prompts=["new"])
    with pytest.raises(RewardError, match="needs a kind that clamps at zero"):
        load_reward("ref-clipscore", weights=clip_directory, captions=known, kind="cosine")
    with pytest.raises(RewardError, match="not a mapping of prompts"):
        load_reward("ref-clipscore", weights=clip_directory, captions=tmp_path / "none.json")


def test_contract(clip):
    check_contract(clip, half_atol=2e-2, long_prompt="cat " * 15)


def test_call_gives_gradients_to_pixels_only_also_after_a_call_without(clip, images, captions):
    clip(images, prompts=captions)  # fills the cache in inference mode
    leaf = images.clone().requires_grad_()
    scores = clip(leaf, prompts=captions)
    scores.sum().backward()
    assert scores.requires_grad and leaf.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


def test_matrix_embeds_each_once_and_its_diagonal_is_the_score(clip, images, captions, monkeypatch):
    calls = []
    encode = ClipReward.encode_prompts
    monkeypatch.setattr(ClipReward, "encode_prompts", lambda self, p: calls.append(list(p)) or encode(self, p))
    matrix = clip.matrix(images[:5], captions)
    assert matrix.shape == (5, 8) and not matrix.requires_grad
    assert torch.allclose(matrix.diagonal(), clip(images[:5], prompts=captions[:5]), atol=1e-6)
    assert calls == [captions], "the second call finds every prompt in the cache"
    clip(images, prompts=["new"] * 8)
    assert calls[1:] == [["new"]]
    assert clip.double().matrix(images[:1], captions[:1]).item() == pytest.approx(matrix[0, 0].item(), abs=1e-5)
    assert calls[2:] == [[captions[0]]], "another dtype empties the cache"


def test_reference_preprocessing_is_close_and_refuses_gradients(clip, clip_directory, images, captions):
    reference = load_reward("clip", weights=clip_directory, preprocessing="reference")
    difference = reference(images, prompts=captions) - clip(images, prompts=captions)
    assert 0 < difference.abs().max() < 2e-3
    with pytest.raises(RewardError, match="preprocessing='reference' has no gradient"):
        reference(images.requires_grad_(), prompts=captions)


def test_tokenizer_golden(clip):
    assert clip.encoder.tokenizer(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, 7),
        ({"pool_type": "eos", "eos_id": 49407}, 7),
        ({"no_causal_mask": True}, 16),
        ({"pool_type": "last"}, 16),
    ],
)
def test_the_text_tower_sees_padding_only_where_it_matters(write_clip, tmp_path, options, seen):
    import open_clip

    write_clip(tmp_path, **options)
    encoder = load_reward("clip", weights=tmp_path, device="cpu").encoder
    lengths, texts = [], ["a photo of a cat", "dog"]
    encoder.model.ln_final.register_forward_hook(lambda module, given, result: lengths.append(result.shape[1]))
    with torch.no_grad():
        ours = unit(encoder.embed_texts(texts))
        assert encoder.tokenize([*texts, "cat " * 14, "cat " * 15])[1] == [7, 3, 16, 17]
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
        expected = open_clip.create_model(f"local-dir:{tmp_path}").eval().encode_text(tokens, normalize=True)
    assert lengths == [seen]
    assert torch.allclose(ours, expected, atol=1e-6) and expected.std(dim=0).max() > 0.01


def test_long_prompts_are_cut_warned_of_once_and_counted(clip, images):
    with pytest.warns(UserWarning, match="clip: 1 of 2 prompts exceed 16 tokens and are cut there"):
        clip(images[:2], prompts=["cat " * 15, "cat " * 14])
    clip(images[:2], prompts=["dog " * 15, ""])
    assert clip.truncated_prompts == 2


def test_a_tokenizer_of_its_own_beside_the_weights(write_clip, tmp_path, images):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<unk>", "red", "blue", "circle", "square", "<end>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 7)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    write_clip(tmp_path, vocab_size=8, context_length=5, hf_tokenizer_name=".")
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(tmp_path)
    clip = load_reward("clip", weights=tmp_path)
    assert clip.encoder.tokenizer(["red circle"]).tolist() == [[1, 3, 5, 7, 0]]
    first, second = clip(images[:1].repeat(2, 1, 1, 1), prompts=["red circle", "blue circle"])
    assert first != second
    with pytest.warns(UserWarning, match="1 of 1 prompts exceed 5 tokens"):
        clip(images[:1], prompts=["red circle blue square"])


def test_a_preset_is_a_subclass(clip, clip_directory, images, captions):
    class ShapesClip(ClipReward):
        """A CLIP of one's own."""

        name = "own-clip"
        licence = "Apache-2.0"
        default_kind = "clipscore"

        @classmethod
        def default_weights(cls):
            return str(clip_directory)

    preset = ShapesClip(device="cpu")
    assert preset.facts.name == "own-clip" and preset.facts.licence == "Apache-2.0"
    expected = 100 * clip(images, prompts=captions).clamp(min=0)
    assert torch.allclose(preset(images, prompts=captions), expected, atol=1e-4)


def test_quick_gelu_mismatch_is_an_error_before_any_download():
    with pytest.raises(RewardError, match="QuickGELU mismatch: 'openai' .* use model='ViT-B-32-quickgelu'"):
        load_reward("clip", model="ViT-B-32", pretrained="openai")
    with pytest.raises(
        RewardError, match="trained with plain GELU, 'roberta-ViT-B-32' has QuickGELU; use another tag"
    ):
        load_reward("clip", model="roberta-ViT-B-32", pretrained="laion2b_s12b_b32k")


def test_wrong_names_and_files_are_refused_with_the_fix(clip_directory, tmp_path):
    for options, message in [
        ({"model": "ViT-B-33"}, "open_clip has no model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ({"pretrained": "opneai"}, "no pretrained tag 'opneai'; did you mean 'openai'"),
        (
            {"weights": "runs/assets/no-such-clip"},
            "no such directory or file; allowed: .*'hf-hub:org/name'",
        ),
        ({"weights": clip_directory, "kind": "hesel"}, "kind 'hesel' is unknown; did you mean 'hessel'"),
        ({"weights": clip_directory, "preprocessing": "pil"}, "preprocessing 'pil' is unknown"),
        ({"weights": tmp_path}, "needs open_clip_config.json, or transformers' config.json"),
    ]:
        with pytest.raises(RewardError, match=message) as caught:
            load_reward("clip", **options)
        assert "\n" not in str(caught.value)


def test_missing_weights_and_towers_are_errors(write_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    write_clip(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    state = load_file(weights)
    del state["visual.proj"]
    save_file(state, weights)
    with pytest.raises(RewardError, match='cannot load CLIP .* Missing key.* "visual.proj"') as caught:
        load_reward("clip", weights=tmp_path)
    assert "\n" not in str(caught.value)
    weights.rename(tmp_path / "model.pt")
    with pytest.raises(RewardError, match="has no weights; open_clip_model.safetensors is expected"):
        load_reward("clip", weights=tmp_path)
    with pytest.raises(RewardError, match="not readable as plain weights"):
        load_reward("clip", weights=tmp_path / "model.pt", model="ViT-B-32")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({}))
    save_file(state, weights)
    with pytest.raises(RewardError, match="missing 'model_cfg'"):
        load_reward("clip", weights=tmp_path)
