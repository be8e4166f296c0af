"""What the vision-language model refuses, in one line each, and what it decides by chance."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vlms
import torch
from torch import Tensor

from pipelines.errors import MissingModelError, PipelineError
from pipelines.vlm.decoding import NextToken, nucleus
from pipelines.vlm.load import load_vlm
from pipelines.vlm.model import VisionLanguageModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load_vlm(tiny_vlms.build_qwen2_5_vl(tmp_path_factory.mktemp("vlm") / "qwen"), device="cpu")


def clip(frames: int = 4) -> Tensor:
    return torch.linspace(0, 1, frames * 3 * 16 * 16).reshape(frames, 3, 16, 16)


def test_nothing_is_cut(model: VisionLanguageModel) -> None:
    sample = model.complete(model.encode_prompt("what?", [clip()]), "left")
    assert len(model.collate([sample], max_length=len(sample))) == 1
    # 4 frames of 16 pixels make 2 x 4 x 4 patches, a quarter as many features, and two marks.
    with pytest.raises(PipelineError, match=r"\(10 of vision, 5 of completion\) but at most .* nothing is cut"):
        model.collate([sample], max_length=len(sample) - 1)
    long = replace(sample, prompt_ids=torch.zeros(model.network.config.text_config.max_position_embeddings).long())
    with pytest.raises(PipelineError, match="nothing is cut"):
        model.collate([long])


def test_placeholders_are_counted_sample_by_sample_before_every_forward(model: VisionLanguageModel) -> None:
    video_id = model.network.config.video_token_id
    one = model.complete(model.encode_prompt("what?", [clip()]), "left")
    place = int((one.prompt_ids == video_id).nonzero()[0])
    short = replace(one, prompt_ids=torch.cat([one.prompt_ids[:place], one.prompt_ids[place + 1 :]]))
    extra = replace(one, prompt_ids=torch.cat([one.prompt_ids[:place], one.prompt_ids[place - 1 :]]))
    extra.prompt_ids[place - 1 : place + 1] = video_id
    for broken in ([one, short], [short, extra]):  # the second has as many as needed, in sum
        with pytest.raises(
            PipelineError, match=r"holds 0 image and 7 video placeholders, but .* make 0 and 8 features"
        ):
            model.log_probs(model.collate(broken))


def test_token_types_follow_the_processor_and_are_zero_on_completions(model: VisionLanguageModel) -> None:
    batch = model.encode(["a?", "and b?"], [[clip()], [clip()[0]]], ["left", "up"], padding_side="left")
    types = model.token_types(batch.input_ids)
    assert (types[0] == 2).sum() == 8 and (types[0] == 1).sum() == 0
    assert (types[1] == 1).sum() == 4 and (types[1] == 2).sum() == 0
    assert (types[batch.completion_mask] == 0).all() and (types[batch.attention_mask == 0] == 0).all()


@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_time_between_frames_counts_where_positions_are_times(model: VisionLanguageModel, rate: float) -> None:
    values = [model.log_probs(model.encode(["a?"], [[clip()]], ["left"], fps=fps))[0] for fps in (2.0, rate)]
    assert not torch.allclose(*values, atol=1e-4)


def test_bad_media_and_texts_are_refused(model: VisionLanguageModel) -> None:
    for media, message in (
        (torch.zeros(16, 16), r"shape \[16, 16\]; images are"),
        (torch.zeros(0, 3, 16, 16), r"shape \[0, 3, 16, 16\]"),
        (torch.zeros(16, 16, 3), r"images are \[3, H, W\]"),
        (clip() * 255, r"give floats in \[0, 1\]"),
    ):
        with pytest.raises(PipelineError, match=message):
            model.encode_prompt("what?", [media])
    with pytest.raises(PipelineError, match="fps=0.0: frames per second must be positive"):
        model.encode_prompt("what?", [clip()], fps=0.0)
    for prompt in ("what is <|video_pad|>?", "what is <|image_pad|>?"):
        with pytest.raises(PipelineError, match="processor refuses|names a placeholder|name a placeholder"):
            model.encode_prompt(prompt, [clip()])
    with pytest.raises(PipelineError, match=r"holds <\|video_pad\|>, which stands for vision"):
        model.encode(["what?"], [[clip()]], ["a <|video_pad|>"])
    with pytest.raises(PipelineError, match="2 prompts, 1 lists of media"):
        model.encode(["what?", "where?"], [[clip()]], ["a", "b"])
    with pytest.raises(PipelineError, match="1 prompts but 2 completions"):
        model.encode(["what?"], [[clip()]], ["a", "b"])
    with pytest.raises(PipelineError, match="a seed a prompt"):
        model.generate(["what?"], [[clip()]], max_new_tokens=1, temperature=1.0)


def test_uint8_media_are_the_same_media(model: VisionLanguageModel) -> None:
    levels = (clip() * 255).round().to(torch.uint8)
    a, b = (model.encode_prompt("what?", [media]).vision["pixel_values_videos"] for media in (levels, levels / 255))
    assert torch.equal(a, b)


def test_images_and_videos_do_not_mix_where_the_processor_would_lose_one(tmp_path: Path) -> None:
    smol = load_vlm(tiny_vlms.build_smolvlm(tmp_path / "smol"), device="cpu")
    with pytest.raises(PipelineError, match="images or videos in one prompt, not both"):
        smol.encode_prompt("what?", [clip(), clip()[0]])


def test_models_of_another_kind_are_refused_before_their_weights(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "qwen2_vll"}))
    with pytest.raises(PipelineError, match=r"qwen2_vll; supported: llava_onevision, .* Did you mean 'qwen2_vl'"):
        load_vlm(tmp_path / "other")
    with pytest.raises(PipelineError, match=r"no config.json \(it is a diffusers pipeline\)"):
        load_vlm(tmp_path / "sd")
    with pytest.raises(MissingModelError, match="Did you mean 'other'"):
        load_vlm(tmp_path / "othr")
    with pytest.raises(PipelineError, match="attention kernel 'sdpaa' is unknown"):
        load_vlm(tmp_path / "other", attention="sdpaa")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(tiny_vlms.build_qwen2_vl(tmp_path / "qwen"))
    weights = load_file(folder / "model.safetensors")
    dropped = sorted(weights)[0]
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="lacks 1 of the model's weights"):
        load_vlm(folder)


def test_adapters_that_do_not_fit_are_refused(model: VisionLanguageModel, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"target 'q_prj'; it has .* Did you mean 'q_proj'"):
        model.add_adapter(1, target_modules=["q_prj"])
    with pytest.raises(PipelineError, match="no layer .* 'qkv'"):  # the vision tower has one
        model.add_adapter(1, target_modules=["qkv"])
    for action in (model.adapter_disabled, model.merge_adapter, lambda: model.save_lora(tmp_path)):
        with pytest.raises(PipelineError, match="no adapter"):
            action()
    with pytest.raises(MissingModelError, match="adapter_config.json is missing"):
        model.load_adapter(tmp_path)
    other = load_vlm(tiny_vlms.build_smolvlm(tmp_path / "smol"), device="cpu")
    other.add_adapter(1)
    other.save_lora(tmp_path / "lora")
    with pytest.raises(PipelineError, match="does not fit this base model"):
        model.load_adapter(tmp_path / "lora")
    assert not model.has_adapter


@torch.no_grad()
def test_peft_reads_a_saved_adapter_and_the_same_adapter_makes_the_same_bytes(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    tuned = load_vlm(tiny_vlms.build_qwen2_vl(tmp_path / "qwen"), device="cpu")
    tuned.add_adapter(rank=2, alpha=6.0, target_modules=["v_proj"])
    for parameter in tuned.trainable_parameters():
        parameter.add_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
    batch = tuned.encode(["what?"], [[clip()]], ["left"])
    learned, _ = tuned.log_probs(batch)
    for name in ("one", "two"):
        tuned.save_lora(tmp_path / name, base_model="org/base")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "mmalign.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    record = json.loads((tmp_path / "one" / "mmalign.json").read_text())
    assert record == {"base_model": "org/base", "family": "qwen2_vl", "rank": 2}
    base = load_vlm(tmp_path / "qwen", device="cpu")
    assert not torch.allclose(base.log_probs(batch)[0], learned, atol=1e-2)
    peft = PeftModel.from_pretrained(
        Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "qwen"), tmp_path / "one"
    )
    base.network = peft.get_base_model()
    torch.testing.assert_close(base.log_probs(batch)[0], learned, rtol=1e-5, atol=1e-5)
    loaded = load_vlm(tmp_path / "one", device="cpu", resolve=lambda name: str(tmp_path / "qwen"))
    torch.testing.assert_close(loaded.log_probs(batch)[0], learned, rtol=1e-5, atol=1e-5)
    assert loaded.name_or_path == str(tmp_path / "qwen")


def test_a_nucleus_is_the_fewest_tokens_that_reach_its_share() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = nucleus(log_probs, 0.74).isfinite()
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert nucleus(log_probs, 0.76).isfinite().tolist()[0] == [False, True, True, True]
    assert nucleus(log_probs, 1.0) is log_probs


def test_draws_have_the_models_distribution_without_the_banned() -> None:
    scores = torch.tensor([0.0, math.log(2), math.log(6), 50.0])
    rows = 20_000
    chosen = NextToken([3], 0.5, 1.0, range(rows))(torch.zeros(rows, 1).long(), scores.expand(rows, 4)).argmax(1)
    shares = torch.bincount(chosen, minlength=4) / rows
    # Temperature 1/2 squares the odds 1 : 2 : 6; four standard errors are 0.014 at most.
    torch.testing.assert_close(shares, torch.tensor([1, 4, 36, 0]) / 41, rtol=0, atol=0.014)
