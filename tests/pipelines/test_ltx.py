"""LTX-Video against diffusers' own pipeline, on tiny models of its real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXPipeline
from flow_tools import moved, noise
from tiny_videos import build_tiny_ltx

from pipelines import PipelineError, VideoOptions, load_generator, sample
from pipelines.families.ltx import DECODE_SEED
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
LENGTH = 48
SHAPE = (2, 8, 3, 8, 8)


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_ltx(tmp_path_factory.mktemp("ltx") / "ltx")


def load(path: str, **video: Any) -> Any:
    options = VideoOptions(**{"height": 32, "width": 32, "frames": 9, "fps": 12.0, **video})
    return load_generator(path, device="cpu", flow=FlowOptions(text_length=LENGTH), video=options)


def load_pipe(path: str) -> Any:
    pipe = LTXPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, x: torch.Tensor, kind: str = "latent", **options: Any) -> torch.Tensor:
    """Return the latents, not packed, or the videos that the pipeline samples from noise `x`."""
    given = {
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
        "frame_rate": 12,
        "max_sequence_length": LENGTH,
        **options,
    }
    size = {"height": 4 * x.shape[3], "width": 4 * x.shape[4], "num_frames": 4 * x.shape[2] - 3}
    made = pipe(prompt=list(PROMPTS), latents=pipe._pack_latents(x), output_type=kind, **size, **given).frames
    return pipe._unpack_latents(made, *x.shape[2:]) if kind == "latent" else made


def test_prompts_and_one_prediction_are_those_of_the_pipeline(ltx: str) -> None:
    generator, pipe, x, t = load(ltx), load_pipe(ltx), noise(*SHAPE), torch.tensor([700.0, 31.5])
    cond = generator.encode_prompts(PROMPTS)
    embeds, mask = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=LENGTH)[:2]
    assert torch.equal(cond.mask, mask)
    torch.testing.assert_close(cond.prompt_embeds[mask], embeds[mask], rtol=1e-5, atol=1e-5)
    call = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "return_dict": False}
    call |= {"num_frames": 3, "height": 8, "width": 8, "hidden_states": pipe._pack_latents(x)}
    with torch.no_grad():
        made = pipe.transformer(timestep=t, rope_interpolation_scale=(4 / 12, 4, 4), **call)[0]
        torch.testing.assert_close(
            generator.predict(x, t, cond), pipe._unpack_latents(made, 3, 8, 8), rtol=1e-5, atol=1e-5
        )
        # The rate of the frames is part of the positions.
        assert (load(ltx, fps=30.0).predict(x, t, cond) - generator.predict(x, t, cond)).abs().max() > 1e-4


@pytest.mark.parametrize(("guidance", "height"), [(1.0, 8), (3.0, 16)])
def test_a_whole_sample_is_that_of_the_pipeline(ltx: str, guidance: float, height: int) -> None:
    generator, pipe, x = load(ltx), load_pipe(ltx), noise(2, 8, 3, height, 8)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=guidance, latents=x).latents
    torch.testing.assert_close(drawn, draw(pipe, x, guidance_scale=guidance), rtol=1e-4, atol=1e-4)
    levels = generator.schedule(4, x.shape[1:]).levels
    assert float(levels[-1]) == pytest.approx(100.0)  # stretched to shift_terminal
    with torch.no_grad():
        videos = draw(pipe, x, "pt", guidance_scale=guidance)
        torch.testing.assert_close(generator.decode(drawn), videos, rtol=1e-4, atol=1e-4)
    assert videos.shape == (2, 9, 3, 4 * height, 32)


def test_latents_are_normalised_by_the_statistics_in_the_autoencoder(ltx: str) -> None:
    generator, pipe = load(ltx), load_pipe(ltx)
    media = torch.rand(2, 9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean = pipe.vae.encode(2 * media.transpose(1, 2) - 1).latent_dist.mean
        shift, std = (one.reshape(1, -1, 1, 1, 1) for one in (pipe.vae.latents_mean, pipe.vae.latents_std))
        expected = (mean - shift) / std
        torch.testing.assert_close(generator.encode(media), expected, rtol=1e-4, atol=1e-5)
    assert float(shift.abs().max()) > 0.2 and expected.shape[1:] == generator.latent_shape


def test_a_decoder_with_a_level_of_its_own_has_the_same_noise_for_every_video(tmp_path: Path) -> None:
    path = build_tiny_ltx(tmp_path / "ltx", conditioned=True)
    generator, pipe, x = load(path), load_pipe(path), noise(*SHAPE)
    latents = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents
    seeds = [torch.Generator().manual_seed(DECODE_SEED) for _ in PROMPTS]
    videos = draw(pipe, x, "pt", decode_timestep=0.05, decode_noise_scale=0.025, generator=seeds)
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(latents), videos, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(generator.decode(latents[1:]), videos[1:], rtol=1e-4, atol=1e-4)
        generator.decode_timestep = 0.5
        assert (generator.decode(latents) - videos).abs().max() > 1e-4


def test_frames_and_sides_name_the_nearest_and_prompts_of_any_length_are_those_of_singles(ltx: str) -> None:
    with pytest.raises(PipelineError, match=r"takes videos of 4k \+ 1 frames, not 8; nearest: 9"):
        load(ltx, frames=8)
    with pytest.raises(PipelineError, match=r"the nearest size is 32 x 36"):
        load(ltx, width=37)
    generator, x, t = load(ltx), noise(*SHAPE), torch.tensor([400.0, 800.0])
    cond = generator.encode_prompts(PROMPTS)
    with torch.no_grad():
        together = generator.predict(x, t, cond)
        for row, prompt in enumerate(PROMPTS):
            alone = generator.predict(x[[row]], t[[row]], generator.encode_prompts([prompt]))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_a_lora_loads_in_the_plain_pipeline(ltx: str, tmp_path: Path) -> None:
    generator, x = load(ltx), noise(*SHAPE)
    generator.add_adapter(4, alpha=8.0)
    moved(generator)
    generator.save_lora(tmp_path / "lora")
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents
    pipe = load_pipe(ltx)
    plain = draw(pipe, x)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn, draw(pipe, x), rtol=1e-4, atol=1e-4)
    assert (drawn - plain).abs().max() > 1e-2
