"""VideoReward on a tiny Qwen2-VL in both published layouts, against transformers' own model and processor."""

import json

import pytest
import tiny_qwen2_vl as tiny
import torch
from contract import PROMPTS, check_contract, smooth_images
from safetensors.torch import save_file

from rewards import RewardError, load_reward, video_align
from rewards.video_align import choose_frames, merge_low_rank

INSTRUCTION = (
    "judge this picture quality rating is <|VQ_reward|> end motion rating is <|MQ_reward|> end prompt says "
    "{text_prompt} alignment rating is <|TA_reward|> end"
)
MEANS, DEVIATIONS = torch.tensor([3.6757, 1.1646, 2.8105]), torch.tensor([2.2476, 1.3811, 2.5121])
ALPHA, RANK = 8, 4


def smooth_videos(count, frames=4, height=48, width=40):
    """Videos `[count, frames, 3, height, width]` in [0.1, 0.9]."""
    return smooth_images(count * frames, height, width).unflatten(0, (count, frames))


@pytest.fixture(scope="module")
def made():
    """The real model with merged weights, its processor, its head; the low-rank updates; and the base model."""
    processor = tiny.processor()
    base = tiny.model(processor.tokenizer, 90)
    processor.tokenizer.add_tokens(list(video_align.TOKENS), special_tokens=True)
    rows = len(processor.tokenizer)
    model = tiny.model(processor.tokenizer, rows)
    for name, value in base.state_dict().items():
        if "embed_tokens" not in name and "lm_head" not in name:
            model.state_dict()[name].copy_(value)
    torch.manual_seed(2)
    updates = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = model.get_submodule(name.replace("model.", "model.language_model.", 1)).weight
        down, up = torch.randn(RANK, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], RANK) * 0.2
        updates[name] = (weight.detach().clone(), down, up)
        weight.data += ALPHA / RANK * up @ down
    return model, processor, torch.randn(3, 32) * 0.3, updates, base


def write_settings(path, **changes):
    settings = {
        "data_config": {
            **{"prompt_template_type": "detailed_special", "sample_type": "uniform", "fps": 2.0, "num_frames": None},
            **{"max_frame_pixels": 200704, "eval_dim": ["VQ", "MQ", "TA"]},
        },
        "model_config": {"use_special_tokens": True, "output_dim": 3, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
    }
    for name, value in changes.items():
        section = next((s for s in settings.values() if name in s), settings)
        section[name] = value
    path.mkdir(parents=True, exist_ok=True)
    (path / "model_config.json").write_text(json.dumps(settings))


def full_state(made):
    """All weights as peft names them: every linear layer with an update has a base layer."""
    model, _, head, updates, _ = made
    state = {}
    for name, value in tiny.published_state(model).items():
        module = name.removesuffix(".weight")
        if module in updates:
            weight, down, up = updates[module]
            state[f"base_model.model.{module}.base_layer.weight"] = weight
            state[f"base_model.model.{module}.lora_A.default.weight"] = down
            state[f"base_model.model.{module}.lora_B.default.weight"] = up
        else:
            state[f"base_model.model.{name}"] = value
    return state | {"base_model.model.rm_head.weight": head}


@pytest.fixture(scope="module")
def directory(made, tmp_path_factory):
    """A checkpoint with all weights, an older one that must not be read, and the base model."""
    path = tmp_path_factory.mktemp("video-reward")
    write_settings(path)
    for step, state in ((900, {"nothing": torch.zeros(1)}), (11352, full_state(made))):
        (path / f"checkpoint-{step}").mkdir()
        torch.save(state, path / f"checkpoint-{step}" / "model.pth")
    tiny.processor().save_pretrained(path / "base")
    made[4].config.save_pretrained(path / "base")
    save_file(tiny.published_state(made[4]), path / "base" / "model.safetensors")
    return path


def load(path, **options):
    given = {"base": path / "base", "instruction": INSTRUCTION, "dtype": "float32", "device": "cpu"}
    return load_reward("video-align", weights=path, **given | options)


@pytest.fixture(scope="module")
def reward(directory):
    return load(directory)


@pytest.fixture
def few_pixels(monkeypatch):
    """Small frames, for tests in which their size does not matter."""
    monkeypatch.setattr(video_align, "LEAST_PIXELS", 4 * 28 * 28)


def by_transformers(made, videos, prompts):
    """The three numbers through the real processor and model, and the head by hand."""
    model, processor, head, *_ = made
    rows = []
    for video, prompt in zip(videos, prompts, strict=True):
        content = [{"type": "video"}, {"type": "text", "text": INSTRUCTION.format(text_prompt=prompt)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        levels = (video * 255).round().byte()
        inputs = processor(videos=[levels], text=[text], return_tensors="pt", do_sample_frames=False)
        hidden, ids = tiny.hidden_states(model, inputs)[0], inputs["input_ids"][0].tolist()
        at = [ids.index(processor.tokenizer.convert_tokens_to_ids(token)) for token in video_align.TOKENS]
        rows.append(torch.stack([hidden[position] @ weight for position, weight in zip(at, head, strict=True)]))
    return torch.stack(rows)


def test_parts_are_read_at_their_tokens_and_added_up(reward, made, directory):
    # 224 x 448 pixels are exactly the least, so that neither side resizes.
    videos = (smooth_videos(2, 4, 224, 448) * 255).round() / 255
    prompts = ["a red circle", "three cyan triangles left of a pink cross"]
    raw = by_transformers(made, videos, prompts)
    expected = (raw - MEANS) / DEVIATIONS
    assert torch.allclose(reward.parts(videos, prompts=prompts), expected, atol=2e-5)
    assert torch.allclose(reward(videos, prompts=prompts), expected.sum(1), atol=5e-5)
    some = load(directory, dims=["TA", "VQ"], normalise=False)
    assert torch.allclose(some(videos, prompts=prompts), raw[:, 0] + raw[:, 2], atol=5e-5)
    assert (raw[0] - raw[1]).abs().min() > 1e-3
    assert some.version.startswith("VQ + TA, raw, instruction ") and reward.version.startswith("VQ + MQ + TA, instr")


def test_contract(reward, few_pixels):
    check_contract(reward, media=smooth_videos(8), half_atol=0.2, slope_rtol=1e-3, atol=2e-5)


def test_adapter_and_the_rest_over_the_base_give_the_same(made, directory, reward, tmp_path, few_pixels):
    state = full_state(made)
    write_settings(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    adapter = {name.replace(".default.", "."): v for name, v in state.items() if ".lora_" in name}
    assert len(adapter) == 4
    save_file(adapter, tmp_path / "checkpoint-5" / "adapter_model.safetensors")
    trained = ("embed_tokens", "visual.merger", "rm_head")
    rest = {name: v for name, v in state.items() if any(part in name for part in trained)}
    torch.save(rest, tmp_path / "checkpoint-5" / "non_lora_state_dict.pth")
    other = load(tmp_path, base=directory / "base")
    videos = smooth_videos(2)
    assert torch.allclose(other(videos, prompts=PROMPTS[:2]), reward(videos, prompts=PROMPTS[:2]), atol=1e-6)
    torch.save({k: v for k, v in rest.items() if "embed" not in k}, tmp_path / "checkpoint-5/non_lora_state_dict.pth")
    with pytest.raises(RewardError, match="has 90 word embeddings, the tokenizer of .* they do not belong together"):
        load(tmp_path, base=directory / "base")


def test_low_rank_updates_are_added_with_their_scale():
    weight, down, up = torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    state = {"a.base_layer.weight": weight, "a.base_layer.bias": weight[0], "a.lora_A.default.weight": down}
    merged = merge_low_rank(state | {"a.lora_B.default.weight": up}, 0.5)
    assert merged.keys() == {"a.weight", "a.bias"}
    assert merged["a.weight"].tolist() == [[2.5, 3.0], [2.0, 5.0]]
    with pytest.raises(RewardError, match="a.lora_A.default.weight has no counterpart lora_B"):
        merge_low_rank(state, 0.5)
    with pytest.raises(RewardError, match="b.lora_A.weight has no weight that it adds to"):
        merge_low_rank({"b.lora_A.weight": down, "b.lora_B.weight": up}, 0.5)


def test_frames_are_chosen_evenly_from_first_to_last():
    def chosen(*given):
        return choose_frames(*given).tolist()

    assert chosen(5, None, 2.0, None) == [0, 1, 2, 3, 4]
    # 48 frames at 8 a second last 6 seconds: 12 of them at 2 a second.
    assert chosen(48, 8.0, 2.0, None) == [0, 4, 9, 13, 17, 21, 26, 30, 34, 38, 43, 47]
    assert chosen(16, 16.0, 2.0, None) == [0, 5, 10, 15], "at least 4"
    assert len(chosen(5000, 2.0, 2.0, None)) == 768, "at most 768"
    assert chosen(3, 8.0, 2.0, None) == [0, 2], "an even number"
    assert chosen(9, None, 2.0, 3) == [0, 3, 5, 8] and chosen(3, None, 2.0, 8) == [0, 1, 2]
    with pytest.raises(RewardError, match="a video of 1 frame has no motion"):
        choose_frames(1, None, 2.0, None)


def test_rate_of_the_media_and_odd_numbers_of_frames(directory, reward, few_pixels):
    videos, prompts = smooth_videos(2, 12), PROMPTS[:2]
    assert torch.equal(
        load(directory, media_fps=6.0)(videos, prompts=prompts), reward(videos[:, [0, 4, 7, 11]], prompts=prompts)
    )
    odd = videos[:, :3]
    assert torch.allclose(reward(odd, prompts=prompts), reward(odd[:, [0, 1, 2, 2]], prompts=prompts), atol=1e-6)
    with pytest.raises(RewardError, match="a video of 1 frame"):
        reward(videos[:, :1], prompts=prompts)


def test_statistics_of_the_checkpoint_go_first(made, directory, tmp_path, reward, few_pixels):
    own = {f"{name}_{key}": value for name in ("VQ", "MQ", "TA") for key, value in (("mean", 0.0), ("std", 2.0))}
    write_settings(tmp_path, inference_config=own)
    (tmp_path / "checkpoint-1").symlink_to(directory / "checkpoint-11352")
    videos, prompts = smooth_videos(2), PROMPTS[:2]
    halved = load(tmp_path, base=directory / "base").parts(videos, prompts=prompts)
    assert torch.allclose(halved, (reward.parts(videos, prompts=prompts) * DEVIATIONS + MEANS) / 2, atol=1e-5)


def test_what_is_not_as_published_is_refused(made, directory, tmp_path, reward):
    for options, message in [
        ({"dims": ["VQ", "MO"]}, "dims has 'MO'; allowed: MQ, TA, VQ"),
        ({"dims": []}, "at least one of VQ, MQ, TA"),
        ({"media_fps": 0.0}, "media_fps is 0.0"),
        ({"preprocessing": "pil"}, "preprocessing 'pil' is unknown"),
        ({"instruction": "{text_prompt} <|VQ_reward|> <|TA_reward|>"}, r"must contain <\|MQ_reward\|> exactly once"),
    ]:
        with pytest.raises(RewardError, match=message):
            load(directory, **options)
    with pytest.raises(RewardError, match="lacks model_config.json"):
        load(tmp_path, base=directory / "base")
    for change, message in [
        (
            {"prompt_template_type": "simple"},
            "prompt_template_type is 'simple'; only 'detailed_special', as published",
        ),
        ({"output_dim": 1}, "output_dim is 1; only 3"),
        ({}, "has no checkpoint-STEP directory"),
    ]:
        write_settings(tmp_path, **change)
        with pytest.raises(RewardError, match=message):
            load(tmp_path, base=directory / "base")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(RewardError, match="neither model.pth nor both of adapter_model.safetensors and non_lora"):
        load(tmp_path, base=directory / "base")
    state = full_state(made)
    torch.save(state | {"base_model.model.rm_head.weight": torch.zeros(2, 32)}, tmp_path / "checkpoint-1/model.pth")
    with pytest.raises(RewardError, match=r"0.weight \[2, 32\] instead of \[3, 32\]"):
        load(tmp_path, base=directory / "base")
    write_settings(tmp_path, peft_lora_config={})
    torch.save(state, tmp_path / "checkpoint-1/model.pth")
    with pytest.raises(RewardError, match="model_config.json lacks lora_alpha and lora_r"):
        load(tmp_path, base=directory / "base")
