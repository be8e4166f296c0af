"""Wan against diffusers' own pipeline, on tiny models of its real classes."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from flow_tools import noise
from tiny_models import build_tiny_sd
from tiny_videos import GEOMETRY, build_tiny_wan

from pipelines import PipelineError, VideoOptions, load_generator, sample
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
LENGTH = 48
SHAPE = (2, 4, 2, 2, 2)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


def load(path: str, **options: Any) -> Any:
    given = {"flow": FlowOptions(text_length=LENGTH), "video": VideoOptions(**GEOMETRY), **options}
    return load_generator(path, device="cpu", **given)


def load_pipe(path: str) -> Any:
    pipe = WanPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, x: torch.Tensor, kind: str = "latent", **options: Any) -> torch.Tensor:
    """Return the latents, or the videos, that the pipeline samples from noise `x`."""
    given = {"guidance_scale": 5.0, "num_inference_steps": 4, "max_sequence_length": LENGTH, **options}
    return pipe(prompt=list(PROMPTS), latents=x, height=16, width=16, num_frames=5, output_type=kind, **given).frames


def test_prompts_and_one_prediction_are_those_of_the_pipeline(wan: str) -> None:
    generator, pipe, x, t = load(wan), load_pipe(wan), noise(*SHAPE), torch.tensor([700.0, 31.5])
    prompts = ["  a red &amp;amp; circle\n", PROMPTS[1]]
    cond = generator.encode_prompts(prompts)
    embeds, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    torch.testing.assert_close(cond.prompt_embeds, embeds, rtol=1e-5, atol=1e-5)
    used = len(pipe.tokenizer(html.unescape("a red & circle"))["input_ids"])
    assert cond.prompt_embeds[0, used - 1].abs().max() > 0 and not cond.prompt_embeds[0, used:].any()
    with torch.no_grad():
        call = {"encoder_hidden_states": embeds, "return_dict": False}
        expected = pipe.transformer(hidden_states=x, timestep=t, **call)[0]
        torch.testing.assert_close(generator.predict(x, t, cond), expected, rtol=1e-5, atol=1e-5)
        for wrong in (-expected, pipe.transformer(hidden_states=x, timestep=1000 - t, **call)[0]):
            assert (generator.predict(x, t, cond) - wrong).abs().max() > 1e-3
        assert (generator.predict(x, t, cond[[1, 0]]) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_whole_sample_is_that_of_the_pipeline(wan: str, guidance: float) -> None:
    generator, pipe, x = load(wan), load_pipe(wan), noise(*SHAPE)
    expected = draw(pipe, x, guidance_scale=guidance)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=guidance, latents=x).latents
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    videos = draw(pipe, x, "pt", guidance_scale=guidance)
    assert videos.shape == (2, *generator.media_shape) == (2, 5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(drawn), videos, rtol=1e-4, atol=1e-4)


def test_the_shipped_solver_is_sampled_on_its_flow(tmp_path: Path) -> None:
    """Wan ships UniPC along a flow; our steps are Euler's with the same shift."""
    path = build_tiny_wan(tmp_path / "unipc", unipc=True)
    generator, pipe, x = load(path), load_pipe(path), noise(*SHAPE)
    assert float(generator.schedule(4).levels[1]) == pytest.approx(1000 * 3 * 0.75 / (1 + 2 * 0.75))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = generator.schedule(4).levels
    pipe.scheduler.set_timesteps = lambda n, device: FlowMatchEulerDiscreteScheduler.set_timesteps(
        pipe.scheduler, n, sigmas=[1.0, 0.75, 0.5, 0.25]
    )
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=5.0, latents=x).latents
    torch.testing.assert_close(drawn, draw(pipe, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe.scheduler.timesteps, grid)


def test_latents_are_normalised_by_channel_both_ways(wan: str) -> None:
    generator, pipe = load(wan), load_pipe(wan)
    media = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = pipe.vae.encode(2 * media.transpose(1, 2) - 1).latent_dist
        mean, std = generator.encode_posterior(media)
        shift = torch.tensor([-0.2, -0.1, 0.0, 0.1]).reshape(1, 4, 1, 1, 1)
        scale = torch.tensor([0.5, 0.75, 1.0, 1.25]).reshape(1, 4, 1, 1, 1)
        torch.testing.assert_close(mean, (posterior.mean - shift) / scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, posterior.std / scale, rtol=1e-4, atol=1e-5)
        assert mean.shape[1:] == generator.latent_shape and generator.latent_shape == (4, 2, 2, 2)
        expected = (pipe.vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
        torch.testing.assert_close(generator.decode(mean), expected, rtol=1e-4, atol=1e-5)


def test_frames_can_be_decoded_alone_and_with_a_gradient(wan: str) -> None:
    generator, latents = load(wan), noise(2, 4, 3, 2, 2).requires_grad_()
    whole = generator.decode(latents)
    part = generator.decode_frames(latents, [0, 1])
    torch.testing.assert_close(part, whole[:, [0, 4]], rtol=1e-4, atol=1e-5)
    assert generator.decode_frames(latents, [2]).shape == (2, 1, 3, 16, 16)
    expected = torch.autograd.grad(whole[:, [0, 4]].sum(), latents)[0]
    found = torch.autograd.grad(part.sum(), latents)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[:, :, :2].abs().max() > 0 and not found[:, :, 2].any()
    checkpointed = generator.decode_checkpointed(latents)
    torch.testing.assert_close(checkpointed, whole)
    torch.testing.assert_close(
        torch.autograd.grad(checkpointed.square().sum(), latents)[0],
        torch.autograd.grad(generator.decode(latents).square().sum(), latents)[0],
    )
    with pytest.raises(PipelineError, match=r"latent frames must lie in 0\.\.2, got \[3\]"):
        generator.decode_frames(latents, [3])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"frames": 16}, r"takes videos of 4k \+ 1 frames, not 16; nearest: 17\."),
        ({"frames": 3}, r"not 3; nearest: 1\."),
        ({"height": 20}, r"sides that are multiples of 16, not 20 x 16; the nearest size is 16 x 16\."),
        ({"width": 25}, r"not 16 x 25; the nearest size is 16 x 32\."),
        ({"fps": 0.0}, r"fps of videos must be above 0, got 0\.0"),
    ],
)
def test_a_geometry_that_does_not_fit_names_the_nearest(wan: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        load(wan, video=VideoOptions(**{**GEOMETRY, **changed}))


def test_the_geometry_is_the_familys_own_unless_chosen(wan: str, tmp_path: Path) -> None:
    generator = load(wan, video=VideoOptions(frames=9))
    assert generator.media_shape == (9, 3, 480, 832) and generator.fps == 16 and generator.modality == "video"
    assert generator.latent_shape == (4, 3, 60, 104) and generator.tokens(generator.latent_shape) == 3 * 30 * 52
    assert "9 frames of 480 x 832 pixels at 16 a second, 48 text tokens" in generator.describe()
    with pytest.raises(PipelineError, match="image_size 64 is for images"):
        load(wan, flow=FlowOptions(image_size=64))
    with pytest.raises(PipelineError, match="which makes images and has no video options"):
        load_generator(build_tiny_sd(tmp_path / "sd"), video=VideoOptions(frames=5))
    with pytest.raises(PipelineError, match=r"\[batch, frames, 3, height, width\], got \[2, 3, 16, 16\]"):
        load(wan).encode(torch.rand(2, 3, 16, 16))


def test_a_lora_loads_in_the_plain_pipeline(wan: str, tmp_path: Path) -> None:
    generator, x = load(wan), noise(*SHAPE)
    generator.add_adapter(4, alpha=8.0)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    assert len(generator.trainable_parameters()) == 2 * 2 * 8  # two layers, self and cross attention, four projections
    generator.save_lora(tmp_path / "lora")
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=5.0, latents=x).latents
    pipe = load_pipe(wan)
    plain = draw(pipe, x)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn, draw(pipe, x), rtol=1e-4, atol=1e-4)
    assert (drawn - plain).abs().max() > 1e-2
    again = load(str(tmp_path / "lora"))
    torch.testing.assert_close(
        sample(again, again.encode_prompts(PROMPTS), steps=4, guidance=5.0, latents=x).latents, drawn
    )


def test_a_merged_model_is_a_plain_pipeline(wan: str, tmp_path: Path) -> None:
    generator, x = load(wan), noise(*SHAPE)
    generator.add_adapter(4)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(0.1)
    generator.save(tmp_path / "merged")
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=5.0, latents=x).latents
    torch.testing.assert_close(draw(load_pipe(str(tmp_path / "merged")), x), drawn, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_the_autoencoder_single(wan: str) -> None:
    generator = load(wan, dtype="bf16")
    assert generator.dtype == torch.bfloat16 and generator.encoder("vae").dtype == torch.float32
    with torch.no_grad():
        output = generator.predict(noise(*SHAPE), torch.tensor([500.0, 500.0]), generator.encode_prompts(PROMPTS))
    assert output.dtype == torch.float32
    assert generator.decode(output).shape == (2, 5, 3, 16, 16)
