"""Wan 2.2 against diffusers' own pipeline: two experts by level, and a time for each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from flow_tools import moved, noise
from tiny_videos import GEOMETRY, build_tiny_wan

from pipelines import PipelineError, VideoOptions, load_generator, sample
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
LENGTH = 48
SHAPE = (2, 4, 2, 2, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wan")
    return {
        "experts": build_tiny_wan(folder / "experts", experts=True),
        "per token": build_tiny_wan(folder / "tokens", per_token=True),
    }


def load(path: str, low_noise_guidance: float | None = None, **video: Any) -> Any:
    flow = FlowOptions(text_length=LENGTH, low_noise_guidance=low_noise_guidance)
    return load_generator(path, device="cpu", flow=flow, video=VideoOptions(**{**GEOMETRY, **video}))


def load_pipe(path: str) -> Any:
    pipe = WanPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, x: torch.Tensor, side: int = 16, kind: str = "latent", **options: Any) -> torch.Tensor:
    given = {"guidance_scale": 4.0, "num_inference_steps": 5, "max_sequence_length": LENGTH, **options}
    return pipe(
        prompt=list(PROMPTS), latents=x, height=side, width=side, num_frames=5, output_type=kind, **given
    ).frames


@pytest.mark.parametrize("low", [None, 3.0, 1.0])
def test_the_experts_sample_as_in_the_pipeline(models: dict[str, str], low: float | None) -> None:
    generator, pipe, x = load(models["experts"], low), load_pipe(models["experts"]), noise(*SHAPE)
    assert sum(generator.schedule(5).levels >= 875) == 2
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=5, guidance=4.0, latents=x).latents
    torch.testing.assert_close(drawn, draw(pipe, x, guidance_scale_2=low), rtol=1e-4, atol=1e-4)
    said = generator.describe()
    assert "experts meet at level 875" in said and ("guidance 3 below" in said) == (low == 3.0)


def test_each_sample_goes_to_its_expert_and_trains_it_alone(models: dict[str, str]) -> None:
    generator, x = load(models["experts"]), noise(*SHAPE)
    cond, experts = generator.encode_prompts(PROMPTS), generator.networks
    levels = torch.tensor([874.9, 875.0])
    expected = []
    for row, name in enumerate(("transformer_2", "transformer")):
        given = {"encoder_hidden_states": cond.prompt_embeds[[row]], "return_dict": False}
        expected.append(experts[name](hidden_states=x[[row]], timestep=levels[[row]], **given)[0])
    torch.testing.assert_close(generator.predict(x, levels, cond), torch.cat(expected), rtol=1e-5, atol=1e-5)
    generator.add_adapter(2)
    moved(generator)
    for level, trained in ((874.9, "transformer_2"), (875.0, "transformer")):
        generator.network.zero_grad()
        generator.predict(x, torch.tensor([level, level]), cond).square().sum().backward()
        for name, expert in generator.networks.items():
            gradients = [one.grad is not None for one in expert.parameters() if one.requires_grad]
            assert gradients and all(found == (name == trained) for found in gradients)
    with generator.adapter_disabled(), torch.no_grad():
        torch.testing.assert_close(generator.predict(x, levels, cond), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_the_loras_of_the_experts_load_in_the_plain_pipeline(models: dict[str, str], tmp_path: Path) -> None:
    generator, x = load(models["experts"]), noise(*SHAPE)
    generator.add_adapter(2, alpha=4.0)
    generator.check_lora_export(tmp_path / "check")
    moved(generator)
    generator.save_lora(tmp_path / "lora")
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=5, guidance=4.0, latents=x).latents
    pipe = load_pipe(models["experts"])
    plain, name = draw(pipe, x), "pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(tmp_path / "lora", weight_name=name)
    one = draw(pipe, x)
    pipe.load_lora_weights(tmp_path / "lora" / "transformer_2", weight_name=name, load_into_transformer_2=True)
    torch.testing.assert_close(drawn, draw(pipe, x), rtol=1e-4, atol=1e-4)
    assert min((drawn - other).abs().max() for other in (plain, one)) > 1e-2
    again = load(str(tmp_path / "lora"))
    drawn_again = sample(again, again.encode_prompts(PROMPTS), steps=5, guidance=4.0, latents=x).latents
    torch.testing.assert_close(drawn_again, drawn)
    generator.save(tmp_path / "merged")
    torch.testing.assert_close(draw(load_pipe(str(tmp_path / "merged")), x), drawn, rtol=1e-4, atol=1e-4)
    with pytest.raises(PipelineError, match="has two experts, and .* holds an adapter for one"):
        load(models["experts"]).load_adapter(tmp_path / "lora" / "transformer_2")


def test_a_time_for_each_token(models: dict[str, str]) -> None:
    generator, pipe = load(models["per token"], height=32, width=64), load_pipe(models["per token"])
    assert generator.latent_shape == (4, 2, 2, 4) and generator.side_multiple == 32
    x, t = noise(2, *generator.latent_shape), torch.tensor([700.0, 31.5])
    cond = generator.encode_prompts(PROMPTS)
    times = t.unsqueeze(1).expand(2, 2 * 1 * 2)
    with torch.no_grad():
        given = {"encoder_hidden_states": cond.prompt_embeds, "return_dict": False}
        expected = pipe.transformer(hidden_states=x, timestep=times, **given)[0]
    torch.testing.assert_close(generator.predict(x, t, cond), expected, rtol=1e-5, atol=1e-5)
    square = x[..., :2]
    drawn = sample(generator, cond, steps=5, guidance=4.0, latents=square).latents
    torch.testing.assert_close(drawn, draw(pipe, square, 32), rtol=1e-4, atol=1e-4)
    videos = draw(pipe, square, 32, "pt")
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(drawn), videos, rtol=1e-4, atol=1e-4)
    own = load_generator(models["per token"], device="cpu")
    assert own.media_shape == (121, 3, 704, 1280) and own.fps == 24


def test_what_experts_need_is_refused_elsewhere(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="low_noise_guidance is for models of two experts"):
        load(models["per token"], 3.0, height=32, width=32)
    path = Path(build_tiny_wan(tmp_path / "wan", experts=True))
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(PipelineError, match="boundary_ratio is None; two experts need a number"):
        load(str(path))
