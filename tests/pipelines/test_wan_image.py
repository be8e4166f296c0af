"""Wan's image-to-video models against diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from flow_tools import noise
from PIL import Image
from tiny_videos import GEOMETRY, build_tiny_wan

from pipelines import PipelineError, VideoOptions, load_generator, sample
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
LENGTH = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan", experts=True, from_image=True)


def load(path: str) -> Any:
    return load_generator(path, device="cpu", flow=FlowOptions(text_length=LENGTH), video=VideoOptions(**GEOMETRY))


def test_a_sample_from_a_first_frame_is_that_of_the_pipeline(model: str) -> None:
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generator, x = load(model), noise(2, 4, 2, 2, 2)
    pipe = WanImageToVideoPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        image=Image.fromarray(pixels.numpy()),
        prompt=list(PROMPTS),
        latents=x,
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).frames
    plain = generator.encode_prompts(PROMPTS)
    cond = generator.with_first_frame(plain, pixels.permute(2, 0, 1)[None] / 255)
    drawn = sample(generator, cond, steps=4, guidance=3.5, latents=x).latents
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    other = generator.with_first_frame(plain, torch.zeros(1, 3, 16, 16))
    assert (sample(generator, other, steps=4, guidance=3.5, latents=x).latents - drawn).abs().max() > 1e-3
    assert cond.first_frame is not None and cond.first_frame.shape == (2, 4 + 4, 2, 2, 2)
    assert torch.equal(cond.first_frame[:, :4].amax((0, 1, 3, 4)), torch.tensor([1.0, 0.0]))
    with pytest.raises(PipelineError, match=r"makes videos of a first frame; give it by generator\.with_first_frame"):
        sample(generator, plain, steps=2, guidance=1.0, latents=x)
    with pytest.raises(PipelineError, match="one for all: got 3"):
        generator.with_first_frame(plain, torch.zeros(3, 3, 16, 16))
    with pytest.raises(PipelineError, match=r"of this model are \[3, 16, 16\], got \[3, 8, 8\]"):
        generator.with_first_frame(plain, torch.zeros(1, 3, 8, 8))


def test_models_that_take_the_first_frame_otherwise_are_refused(tmp_path: Path) -> None:
    path = Path(build_tiny_wan(tmp_path / "wan", from_image=True))
    index = json.loads((path / "model_index.json").read_text())
    for changed, said in (
        ({"expand_timesteps": True}, "takes it in place of latents"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "takes CLIP's embeddings of it"),
    ):
        (path / "model_index.json").write_text(json.dumps({**index, **changed}))
        with pytest.raises(PipelineError, match=said):
            load(str(path))
