"""VQAScore on tiny models of the real classes: a CLIP-FlanT5 in the published layout, and two chat models."""

import json

import pytest
import torch
from contract import PROMPTS, check_contract, smooth_images
from safetensors.torch import save_file

from rewards import RewardError, load_reward
from rewards.backbones.preprocess import OPENAI
from rewards.media import load_image
from rewards.vqa_score import FORMS, SYSTEM, pad_to_square

WORDS = (
    "A chat between curious user and an artificial intelligence assistant. The gives helpful, detailed, polite "
    "answers to the user's questions. USER: ASSISTANT: Does this figure show \" ? Please answer yes or no. Yes No "
    "a photo of red blue yellow green circle two squares star ring cat dog three cyan triangles left pink cross"
).split()
QUESTION = FORMS["clip-flant5"].question


def scatter(cls, config):
    """Make a model with large weights, so that every part of it matters; norms stay near one."""
    torch.manual_seed(0)
    module = cls(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return module.eval()


def t5_tokenizer():
    """A real T5 tokenizer that knows the words above."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ('"', -3.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in dict.fromkeys(WORDS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


@pytest.fixture(scope="module")
def parts():
    """T5, image tower and projector."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(t5_tokenizer()) + 6,  # a few unused rows, as the real one has
        **{"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    t5 = scatter(T5ForConditionalGeneration, config)
    t5.lm_head.weight.data *= 0.1  # an answer that is not settled
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = scatter(CLIPVisionModel, CLIPVisionConfig(**tower, image_size=32, patch_size=8))
    torch.manual_seed(1)
    projector = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    return t5, vision, projector


@pytest.fixture(scope="module")
def published(parts):
    """The names and tensors of a published checkpoint."""
    t5, vision, projector = parts
    state = dict(t5.state_dict())
    state["embed_tokens.weight"] = state["shared.weight"].clone()
    state |= {f"mm_projector.{name}": value for name, value in projector.state_dict().items()}
    for name, value in vision.state_dict().items():
        state[f"vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = value
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


@pytest.fixture(scope="module")
def directory(parts, published, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip-flant5")
    parts[1].config.save_pretrained(path / "tower")
    return write(path, parts, published)


def write(path, parts, state, **settings):
    config = parts[0].config.to_dict() | {"model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"]}
    config |= {"mm_vision_tower": str(path / "tower"), "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_select_layer": -2, "mm_hidden_size": 32} | settings
    (path / "config.json").write_text(json.dumps(config))
    t5_tokenizer().save_pretrained(path)
    save_file(state, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def reward(directory):
    return load_reward("vqa-score", weights=directory, dtype="float32", device="cpu")


def by_hand(parts, image, prompt):
    """sqrt(P(Yes) P(</s> | Yes)) for one image of the tower's size, through the parts alone."""
    t5, vision, projector = parts
    tokenizer = t5_tokenizer()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in OPENAI)
    with torch.no_grad():
        hidden = vision((image[None] - mean) / std, output_hidden_states=True).hidden_states
        assert len(hidden) == 4
        features = projector(hidden[2][0, 1:])
        chunks = [f"{SYSTEM} USER: ", f"\n{QUESTION.format(prompt)} ASSISTANT: "]
        before, after = (t5.shared(torch.tensor(tokenizer(chunk)["input_ids"])) for chunk in chunks)
        logits = t5(
            inputs_embeds=torch.cat([before, features, after])[None],
            decoder_input_ids=torch.tensor([[0, tokenizer("Yes")["input_ids"][0]]]),
        ).logits[0, :, : len(tokenizer)]
    probability = logits.softmax(-1)
    return (probability[0, tokenizer("Yes")["input_ids"][0]] * probability[1, 1]).sqrt().item()


def test_score_is_the_root_of_yes_and_the_end_after_it(reward, parts):
    images = (smooth_images(4, 32, 32) * 255).round() / 255
    prompts = ["a photo of a cat", "two red squares left of a ring", "", "dog"]
    scores = reward(images, prompts=prompts)
    expected = [by_hand(parts, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.std() > 1e-3
    tokens = t5_tokenizer()
    assert tokens("Yes")["input_ids"][1:] == [1], "the answer ends with </s>"
    assert len(reward.tokenizer) < reward.model.t5.config.vocab_size, "and unused rows take no probability"


def test_tokens_of_the_question_are_those_of_its_words(reward):
    index = {token: i for i, (token, *_) in enumerate(t5_tokenizer()._vocab_scores)}
    question = reward._ids('\nDoes this figure show "a cat"? Please answer yes or no. ASSISTANT: ').tolist()
    assert question[:4] == [index[f"▁{word}"] for word in ("Does", "this", "figure", "show")]
    assert question[-2:] == [index["▁ASSISTANT:"], 1], "a trailing blank gives no token, every part its </s>"


def test_contract(reward):
    # T5 normalises in float32, also in float64.
    check_contract(reward, half_atol=0.05, long_prompt="red " * 2100, slope_rtol=1e-3)


def test_wide_images_are_padded_with_the_mean_colour():
    from PIL import Image

    image = Image.new("RGB", (4, 2), (255, 0, 0))
    square = Image.new("RGB", (4, 4), (122, 116, 104))
    square.paste(image, (0, 1))
    assert torch.equal(pad_to_square(load_image(image)[None])[0], load_image(square))
    high = pad_to_square(torch.zeros(2, 3, 5, 2, dtype=torch.float64))
    assert high.shape == (2, 3, 5, 5) and high.dtype == torch.float64
    assert (high[:, 0, 0] * 255).round().tolist() == [[122, 0, 0, 122, 122]] * 2
    media = torch.rand(1, 3, 4, 4)
    assert torch.equal(pad_to_square(media), media)


def test_images_are_encoded_once_for_all_prompts(reward, monkeypatch):
    calls = []
    encode = type(reward.model).image_features
    monkeypatch.setattr(
        type(reward.model), "image_features", lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels)
    )
    assert reward.matrix(smooth_images(3), ["red circle", "cat"]).shape == (3, 2)
    assert calls == [3]


def test_tower_apart_shards_and_torch_files(parts, published, directory, reward, tmp_path):
    """What a checkpoint may also look like: no image tower inside, several files, files of torch."""
    parts[1].save_pretrained(tmp_path / "tower")
    language = {name: value for name, value in published.items() if not name.startswith("vision_tower.")}
    write(tmp_path, parts, language)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(language)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, inside in shards.items():
        torch.save({name: language[name] for name in inside}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    other = load_reward("vqa-score", weights=tmp_path, dtype="float32", device="cpu")
    images = smooth_images(2)
    assert torch.allclose(other(images, prompts=PROMPTS[:2]), reward(images, prompts=PROMPTS[:2]), atol=1e-6)
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(RewardError, match="pytorch_model-2.bin is missing, which pytorch_model.bin.index.json lists"):
        load_reward("vqa-score", weights=tmp_path)


def test_question_and_answer_are_options_and_part_of_the_version(directory, reward):
    other = load_reward("vqa-score", weights=directory, dtype="float32", question="{} ?", answer="No")
    assert other.version == "clip-flant5, question '{} ?', answer 'No'" and reward.version == "clip-flant5"
    images = smooth_images(2)
    assert (other(images, prompts=PROMPTS[:2]) - reward(images, prompts=PROMPTS[:2])).abs().min() > 1e-4
    assert load_reward("vqa-score", weights=directory).dtype == torch.bfloat16, "the default, as published"


def test_wrong_options_and_weights_are_refused(directory, reward, parts, published, tmp_path):
    for options, message in [
        ({"form": "clip-flan"}, "form 'clip-flan' is unknown; did you mean 'clip-flant5'"),
        ({"question": "Is it so?"}, "exactly one {} is expected"),
        ({"preprocessing": "pil"}, "preprocessing 'pil' is unknown"),
        ({"form": "vlm", "preprocessing": "reference"}, "apply to form='clip-flant5' only"),
        ({"weights": tmp_path / "nowhere"}, "no such directory; give a model's directory, or its hub repository"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward("vqa-score", **{"weights": directory} | options)
    parts[1].config.save_pretrained(tmp_path / "tower")
    for change, settings, message in [
        ({"mm_projector.2.bias": None}, {}, "lacks 2.bias"),
        ({"decoder.final_layer_norm.weight": None}, {}, "lacks decoder.final_layer_norm.weight"),
        ({"decoder.more": torch.zeros(1)}, {}, "has unknown decoder.more"),
        ({"lm_head.weight": torch.zeros(3, 24)}, {}, "has other shapes for lm_head.weight"),
        ({}, {"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not supported"),
        ({}, {"mm_vision_tower": None}, "names no mm_vision_tower"),
    ]:
        state = {name: value for name, value in (published | change).items() if value is not None}
        with pytest.raises(RewardError, match=message):
            load_reward("vqa-score", weights=write(tmp_path, parts, state, **settings))
    with pytest.raises(RewardError, match="prompt 'a </s> cat' contains the special token '</s>'; remove it"):
        reward(smooth_images(1), prompts=["a </s> cat"])


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}"
)


def word_tokenizer(*special):
    """A whitespace tokenizer of the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<end>", *special, *dict.fromkeys(WORDS)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def write_qwen(path):
    """A tiny Qwen2.5-VL with its processor."""
    import transformers

    vision = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = word_tokenizer(*vision)
    ids = dict(zip(vision, tokenizer.convert_tokens_to_ids(vision), strict=True))
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **text,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4},
            **{"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16, "spatial_merge_size": 2},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    scatter(transformers.Qwen2_5_VLForConditionalGeneration, config).save_pretrained(path)
    patches = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
    transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**patches),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**patches),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|> "),
    ).save_pretrained(path)


def write_llava(path):
    """A tiny LLaVA with its processor."""
    import transformers

    tokenizer = word_tokenizer("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 32, "patch_size": 8},
        ),
        text_config=transformers.LlamaConfig(
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    scatter(transformers.LlavaForConditionalGeneration, config).save_pretrained(path)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image> "),
    ).save_pretrained(path)


@pytest.mark.parametrize("write_model", [write_qwen, write_llava])
def test_any_chat_model_answers(write_model, tmp_path):
    write_model(tmp_path)
    reward = load_reward("vqa-score", form="vlm", weights=tmp_path, dtype="float32", device="cpu")
    check_contract(reward, spread=1e-4, half_atol=0.05)
    images, prompts = smooth_images(2), ["a cat", "two red squares left of a ring"]
    expected = []
    model, processor = reward.model.model, reward.model.processor
    for image, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": f'Does this image show "{prompt}"?'}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        levels = (image * 255).round().byte()
        inputs = processor(images=[levels], text=[text], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        expected.append(logits.softmax(-1)[reward.tokenizer.convert_tokens_to_ids("Yes")].item())
    assert reward(images, prompts=prompts).tolist() == pytest.approx(expected, abs=1e-5)
    assert not reward.differentiable and reward.version == "vlm"
    with pytest.raises(RewardError, match="contains the special token '<image>'"):
        reward(images, prompts=["<image>", "cat"])
