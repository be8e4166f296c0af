"""VideoScore on a tiny Idefics2 in the published layout, against transformers' own model and processor."""

import pytest
import torch
import transformers
from contract import PROMPTS, check_contract, smooth_images
from PIL import Image
from safetensors.torch import save_file
from tiny_qwen2_vl import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers

from rewards import RewardError, load_reward, video_score
from rewards.video_score import choose_frames, fit_size

INSTRUCTION = "judge this picture the prompt says {text_prompt} rating of quality and motion "
LATENTS, WIDTH = 2, 32


def processor():
    """A real Idefics2 processor around a tokenizer of whole words; the images of its model are 28 pixels wide."""
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *WORDS])
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["<fake_token_around_image>", "<image>", "<end_of_utterance>"], special_tokens=True)
    size = {"shortest_edge": 28, "longest_edge": 56}
    images = transformers.Idefics2ImageProcessor(
        size=size, do_image_splitting=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.Idefics2Processor(images, tokenizer, image_seq_len=LATENTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The real model, its processor, its head, and the directory with all three."""
    path = tmp_path_factory.mktemp("video-score")
    known = processor()
    torch.manual_seed(0)
    config = transformers.Idefics2Config(
        image_token_id=known.tokenizer.convert_tokens_to_ids("<image>"),
        text_config={
            **{"model_type": "mistral", "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(known.tokenizer)},
            **{"pad_token_id": known.tokenizer.pad_token_id, "head_dim": 8},
        },
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 56, "patch_size": 14},
        },
        perceiver_config={
            **{"hidden_size": WIDTH, "resampler_n_latents": LATENTS, "resampler_depth": 1, "resampler_n_heads": 2},
            **{"resampler_head_dim": 8, "num_key_value_heads": 1},
        },
        num_labels=5,
    )
    model = transformers.Idefics2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            large = 1.0 if "embed" in name or "latents" in name else 0.2
            parameter.add_(torch.randn_like(parameter) * (large if parameter.dim() > 1 else 0.1))
    head = torch.nn.Linear(WIDTH, 5)
    known.save_pretrained(path)
    config.save_pretrained(path)
    save_file(published_state(model, head), path / "model.safetensors")
    return model, known, head, path


def published_state(model, head):
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    return state | {f"score.{name}": value.detach().clone() for name, value in head.state_dict().items()}


def smooth_videos(count, frames=3, height=40, width=48):
    return smooth_images(count * frames, height, width).unflatten(0, (count, frames))


def load(path, **options):
    given = {"instruction": INSTRUCTION, "dtype": "float32", "device": "cpu"}
    return load_reward("video-score", weights=path, **given | options)


@pytest.fixture(scope="module")
def reward(made):
    return load(made[3])


def by_transformers(made, video, prompt):
    """The five numbers through the real processor and model, frame by frame, and the head by hand."""
    model, known, head, _ = made
    text = INSTRUCTION.format(text_prompt=prompt) + "<image> " * len(video)
    levels = [Image.fromarray((frame * 255).round().byte().movedim(0, -1).numpy()) for frame in video]
    inputs = known(text=text, images=levels, return_tensors="pt")
    with torch.no_grad():
        return head(model(**inputs).last_hidden_state[0, -1])


def test_five_aspects_are_read_at_the_last_token_and_averaged(made, reward):
    # 40 x 84 becomes 28 x 56
    videos, prompts = smooth_videos(2, width=84), ["a red circle", "three cyan triangles left of a pink cross"]
    videos = (videos * 255).round() / 255
    expected = torch.stack([by_transformers(made, v, p) for v, p in zip(videos, prompts, strict=True)])
    # the ways to resize differ in roundings alone
    assert torch.allclose(reward.parts(videos, prompts=prompts), expected, atol=5e-3)
    by_pil = load(made[3], preprocessing="reference")
    assert torch.allclose(by_pil.parts(videos, prompts=prompts), expected, atol=5e-3)
    exact = (smooth_videos(2, height=56, width=42) * 255).round() / 255
    expected = torch.stack([by_transformers(made, v, p) for v, p in zip(exact, prompts, strict=True)])
    assert torch.allclose(reward.parts(exact, prompts=prompts), expected, atol=2e-5)
    assert torch.allclose(reward(exact, prompts=prompts), expected.mean(1), atol=2e-5)
    some = load(made[3], aspects=["dynamic-degree", "visual-quality"])
    assert torch.allclose(some(exact, prompts=prompts), expected[:, [0, 2]].mean(1), atol=2e-5)
    assert (expected[0] - expected[1]).abs().min() > 1e-3
    assert some.version.startswith("v1.1, visual-quality + dynamic-degree, instruction ")


def test_contract(reward):
    check_contract(reward, media=smooth_videos(8), atol=2e-5, half_atol=0.1, slope_rtol=1e-3, spread=1e-2)


def test_frames_of_middle_grey_are_seen(made, reward):
    videos = smooth_videos(1)
    videos[:, 1] = 0.5
    grey = torch.full((1, 3, 3, 40, 48), 0.5)
    assert reward(videos, prompts=["a red circle"]).isfinite().all()
    assert reward(grey, prompts=["a red circle"]).isfinite().all()


def test_frames_and_sizes():
    assert choose_frames(5, 16).tolist() == [0, 1, 2, 3, 4]
    assert choose_frames(40, 16).tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert fit_size(512, 512, least=378, most=980) == (512, 512)
    assert fit_size(1080, 1920, least=378, most=980) == (551, 980)
    assert fit_size(320, 576, least=378, most=980) == (378, 576)
    assert fit_size(2000, 500, least=378, most=980) == (980, 378)


def test_long_videos_are_cut_to_the_frames_of_training(made, monkeypatch):
    monkeypatch.setitem(video_score.VERSIONS, "v1", video_score.Version("x", 2))
    videos, prompts = smooth_videos(2, frames=5), PROMPTS[:2]
    short = load(made[3], version="v1")
    assert torch.equal(short(videos, prompts=prompts), short(videos[:, [0, 2]], prompts=prompts))


def test_what_is_not_as_published_is_refused(made, tmp_path):
    model, known, head, path = made
    for options, message in [
        ({"version": "v2"}, "version 'v2' is unknown; .*allowed: v1, v1.1"),
        ({"aspects": ["motion"]}, "aspects has 'motion'; allowed: dynamic-degree"),
        ({"aspects": []}, "at least one of visual-quality"),
        ({"preprocessing": "pil"}, "preprocessing 'pil' is unknown"),
        ({"instruction": "no place"}, "not a file, and not a text with {text_prompt}"),
    ]:
        with pytest.raises(RewardError, match=message):
            load(path, **options)
    with pytest.raises(RewardError, match=r"prompt 'an <image>' contains the special token '<image>'"):
        load(path)(smooth_videos(1), prompts=["an <image>"])
    known.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    state = published_state(model, head)
    save_file({k: v for k, v in state.items() if "score" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=r"score.\*: lacks 0.weight"):
        load(tmp_path)
    save_file(state | {"model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match="has unknown extra"):
        load(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    known.image_processor.do_image_splitting = True
    known.save_pretrained(tmp_path)
    known.image_processor.do_image_splitting = False
    with pytest.raises(RewardError, match="its processor splits images"):
        load(tmp_path)
