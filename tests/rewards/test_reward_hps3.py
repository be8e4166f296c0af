"""HPSv3 on a tiny Qwen2-VL in the published layout, against transformers' own model and processor."""

import hashlib

import pytest
import tiny_qwen2_vl as tiny
import torch
from contract import PROMPTS, check_contract, smooth_images
from safetensors.torch import save_file

from rewards import RewardError, hps3, load_reward
from rewards.backbones.instruction import Instruction, read_instruction
from rewards.backbones.weights import Weights
from rewards.bases.qwen2_vl import patchify, smart_resize

INSTRUCTION = "judge this picture of quality prompt says {text_prompt} the rating is <|Reward|> end"


@pytest.fixture(scope="module")
def made():
    """The real model, the real processor with the reward token, and a head."""
    processor = tiny.processor()
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    model = tiny.model(processor.tokenizer, len(processor.tokenizer))
    torch.manual_seed(1)
    sizes = {0: (32, 1024), 3: (1024, 16), 5: (16, 2)}
    head = {index: (torch.randn(o, i) / i**0.5, torch.randn(o) * 0.1) for index, (i, o) in sizes.items()}
    return model, processor, head


@pytest.fixture(scope="module")
def directory(made, tmp_path_factory):
    """Weights as published, and the base: a Qwen2-VL whose configuration has other rows, as the real one has."""
    model, _, head = made
    path = tmp_path_factory.mktemp("hps3")
    state = tiny.published_state(model)
    for index, (weight, bias) in head.items():
        state |= {f"rm_head.{index}.weight": weight, f"rm_head.{index}.bias": bias}
    save_file(state, path / "HPSv3.safetensors")
    base = tiny.processor()
    base.save_pretrained(path / "base")
    tiny.model(base.tokenizer, 100).config.save_pretrained(path / "base")
    return path


def load(path, **options):
    given = {"base": path / "base", "instruction": INSTRUCTION, "dtype": "float32", "device": "cpu"}
    return load_reward("hps-v3", weights=path, **given | options)


@pytest.fixture(scope="module")
def reward(directory):
    return load(directory)


@pytest.fixture
def few_pixels(monkeypatch):
    """Four tokens an image instead of 256, for tests in which the number does not matter."""
    monkeypatch.setattr(hps3, "PIXELS", 4 * 28 * 28)


def by_transformers(made, images, prompts, read=tiny.hidden_states):
    """Mean and standard deviation through the real processor and model, and the head by hand."""
    model, processor, head = made
    results = []
    for image, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION.format(text_prompt=prompt)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[(image * 255).round().byte()], text=[text], return_tensors="pt")
        at = inputs["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids("<|Reward|>"))
        hidden = read(model, inputs)[0, at]
        for index, (weight, bias) in head.items():
            hidden = (hidden.relu() if index else hidden) @ weight.T + bias
        results.append([hidden[0].item(), hidden[1].exp().item()])
    return results


def test_score_is_the_mean_at_the_reward_token(reward, made):
    images = (smooth_images(2, 448, 448) * 255).round() / 255
    prompts = ["a red circle", "three cyan triangles left of a pink cross"]
    expected = by_transformers(made, images, prompts)
    assert reward(images, prompts=prompts).tolist() == pytest.approx([mean for mean, _ in expected], abs=2e-5)
    pairs = reward.mean_and_deviation(images, prompts=prompts)
    assert pairs.tolist() == [pytest.approx(pair, abs=2e-5) for pair in expected]
    spatial = by_transformers(made, images, prompts, lambda model, inputs: model.model(**inputs).last_hidden_state)
    assert abs(spatial[0][0] - expected[0][0]) > 1e-4, "positions in three dimensions would give another score"
    assert (pairs[:, 1] > 0).all() and abs(expected[0][0] - expected[1][0]) > 1e-3


def test_contract(reward, few_pixels):
    # Norms and rotations are computed in float32, also in float64.
    check_contract(reward, half_atol=0.2, slope_rtol=1e-3, atol=2e-5)


def test_patches_are_those_of_the_real_processor(made):
    _, processor, _ = made
    images = (smooth_images(2, 56, 84) * 255).round() / 255
    real = processor.image_processor(images=[(image * 255).round().byte() for image in images], return_tensors="pt")
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{k}")).view(3, 1, 1) for k in ("mean", "std"))
    patches, grid = patchify(((images - mean) / std)[:, None], 14, 2, 2)
    assert torch.allclose(patches.flatten(0, 1), real["pixel_values"], atol=1e-5)
    assert real["image_grid_thw"].tolist() == [list(grid)] * 2 == [[1, 4, 6]] * 2


def test_sizes_are_multiples_of_28_near_the_number_of_pixels():
    bounds = {"factor": 28, "least": 200704, "most": 200704}
    # 512 x 512: 448 x 448. 1024 x 768: by sqrt(1024 * 768 / 200704) = 1.97949 to 517.3 x 387.98, down to 504 x 364.
    # 100 x 300: by sqrt(200704 / 30000) = 2.58653 to 258.7 x 775.96, up to 280 x 784.
    for size, expected in [((512, 512), (448, 448)), ((1024, 768), (504, 364)), ((100, 300), (280, 784))]:
        assert smart_resize(*size, **bounds) == expected
    assert smart_resize(5, 100, factor=28, least=1, most=10**6) == (28, 112)
    # 28 x 588 is too many; by sqrt(3 * 600 / 3136) = 0.75761 to 3.96 x 791.96, down to 0 x 784, but not below 28.
    assert smart_resize(3, 600, factor=28, least=1, most=28 * 28 * 4) == (28, 784)
    with pytest.raises(RewardError, match="media of 1 x 201 pixels: one side may be at most 200 times the other"):
        smart_resize(1, 201, **bounds)


def test_images_are_encoded_once_for_all_prompts(reward, few_pixels, monkeypatch):
    calls = []
    encode = type(reward.reader).encode
    monkeypatch.setattr(
        type(reward.reader),
        "encode",
        lambda self, media, *rest: calls.append(len(media)) or encode(self, media, *rest),
    )
    assert reward.matrix(smooth_images(3), ["a red circle", "cat"]).shape == (3, 2)
    assert calls == [3]


def test_dtype_and_the_heads(directory, reward, few_pixels):
    half = load(directory, dtype=None)
    assert half.dtype == torch.bfloat16 and half.reader.model.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == torch.float32
    images = smooth_images(2)
    pil = load(directory, preprocessing="reference")
    difference = (pil(images, prompts=PROMPTS[:2]) - reward(images, prompts=PROMPTS[:2])).abs().max()
    assert 0 < difference < 0.1


def test_another_instruction_is_told_by_the_version_and_the_score(directory, reward, few_pixels):
    other = load(directory, instruction=INSTRUCTION.replace("quality", "motion"))
    assert reward.version == "v3, instruction " + hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:8]
    assert other.version != reward.version
    images = smooth_images(2)
    assert (other(images, prompts=PROMPTS[:2]) - reward(images, prompts=PROMPTS[:2])).abs().min() > 1e-4


def test_instructions_are_read_from_texts_and_python_and_known_by_their_hash(tmp_path, monkeypatch):
    text = "Judge.\nPrompt: {text_prompt}\n\nRating: <|Reward|>\n"
    file = Weights("org/name", "prompts.py", host="https://nowhere.invalid")
    known = Instruction(file, ("FIRST", "SECOND"), hashlib.sha256(text.encode()).hexdigest())
    path = tmp_path / "prompts.py"
    path.write_text(
        'raise SystemExit("never run")\nOTHER = 1\nFIRST = """Judge.\nPrompt: {text_prompt}\n"""\n'
        'SECOND = """\nRating: <|Reward|>\n"""\n'
    )
    (tmp_path / "prompt.txt").write_text(text)
    for given in (path, str(path), tmp_path / "prompt.txt", text):
        template = read_instruction(known, given)
        assert template == (text, "")
    assert template.fill("{x} {text_prompt}") == text.replace("{text_prompt}", "{x} {text_prompt}")
    monkeypatch.setattr("rewards.backbones.instruction.locate", lambda published: path)
    assert read_instruction(known).text == text
    with pytest.raises(RewardError, match="prompts.py does not hold the published instruction"):
        read_instruction(Instruction(file, ("FIRST", "SECOND"), "0" * 64))
    monkeypatch.undo()
    for given, message in [
        ("no such file", "not a file, and not a text with {text_prompt} in place of the prompt"),
        ("{text_prompt} {text_prompt}", "the text given: {text_prompt} must occur in the instruction exactly once"),
    ]:
        with pytest.raises(RewardError, match=message):
            read_instruction(known, given)
    with pytest.raises(RewardError, match="lacks the constants FIRST and THIRD"):
        read_instruction(Instruction(file, ("FIRST", "THIRD"), ""), path)
    path.write_text("def (")
    with pytest.raises(RewardError, match="is not Python"):
        read_instruction(known, path)


def test_instruction_that_cannot_be_fetched(monkeypatch):
    def fail(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TORCH_HOME", "/nonexistent-cache")
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_args, **_options: None)
    with pytest.raises(RewardError, match="cannot fetch MizzenAI/HPSv3.*no network; or give instruction=PATH"):
        load_reward("hps-v3", weights="nowhere")


def test_wrong_weights_and_prompts_are_refused(directory, reward, made, tmp_path):
    from safetensors.torch import load_file

    state = load_file(directory / "HPSv3.safetensors")
    embedding = "model.embed_tokens.weight"
    for change, message in [
        ({"rm_head.5.bias": None}, r"rm_head.\*: lacks 5.bias"),
        ({"rm_head.0.weight": torch.zeros(1024, 31)}, r"0.weight \[1024, 31\] instead of \[1024, 32\]"),
        ({"visual.merger.ln_q.weight": None}, "lacks visual.merger.ln_q.weight"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}, "has unknown language_model.layers.2.mlp"),
        ({embedding: state[embedding][:-1].clone()}, "word embeddings, the tokenizer of .* with <|Reward|>"),
    ]:
        changed = {name: value for name, value in (state | change).items() if value is not None}
        save_file(changed, tmp_path / "HPSv3.safetensors")
        with pytest.raises(RewardError, match=message):
            load(tmp_path, base=directory / "base")
    with pytest.raises(RewardError, match=r"must contain <\|Reward\|> exactly once"):
        load(directory, instruction="{text_prompt}")
    with pytest.raises(RewardError, match=r"contains the special token '<\|image_pad\|>'"):
        reward(smooth_images(1), prompts=["a <|image_pad|>"])
