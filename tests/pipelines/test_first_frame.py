"""Image-to-video models of Wan and CogVideoX against diffusers' own pipelines, on tiny models of their classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, WanImageToVideoPipeline
from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video
from flow_tools import moved, noise
from PIL import Image
from tiny_models import BuiltModels
from tiny_motion import LENGTH as COG_LENGTH
from tiny_motion import build_tiny_cogvideox
from tiny_videos import GEOMETRY, build_tiny_wan

from pipelines import PipelineError, VideoOptions, load_generator, sample
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
LENGTH = 48
BUILDERS: dict[str, Callable[[Path], str]] = {
    "wan 2.2 a14b": lambda path: build_tiny_wan(path, experts=True, from_image=True),
    "wan 2.1": lambda path: build_tiny_wan(path, from_image=True, clip=True),
    "wan ti2v": lambda path: build_tiny_wan(path, per_token=True, from_image=True),
    "wan ti2v as text": lambda path: build_tiny_wan(path, per_token=True),
    "cogvideox 5b": lambda path: build_tiny_cogvideox(path, from_image=True),
    "cogvideox 1.5": lambda path: build_tiny_cogvideox(path, "1.5", from_image=True),
}
SIDE = {"wan ti2v": 32, "wan ti2v as text": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> BuiltModels:
    return BuiltModels(tmp_path_factory.mktemp("first"), BUILDERS)


def load(models: BuiltModels, name: str, **options: Any) -> Any:
    if name.startswith("cogvideox"):
        return load_generator(models[name], device="cpu", video=VideoOptions(frames=9), **options)
    side = SIDE.get(name, 16)
    video = VideoOptions(**{**GEOMETRY, "height": side, "width": side})
    return load_generator(models[name], device="cpu", flow=FlowOptions(text_length=LENGTH), video=video, **options)


def load_pipe(path: str) -> Any:
    if "cogvideox" in path:
        pipe = CogVideoXImageToVideoPipeline.from_pretrained(path)
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    else:
        pipe = WanImageToVideoPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(side: int = 16, seed: int = 0) -> torch.Tensor:
    """Return an image of 8-bit levels, [3, side, side] in [0, 1]."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, side, side), generator=source).float() / 255


def draw(pipe: Any, image: torch.Tensor, x: torch.Tensor, kind: str = "latent", **options: Any) -> torch.Tensor:
    """Return the latents that the pipeline samples from noise `x`, channels first, or its videos."""
    cog, side = isinstance(pipe, CogVideoXImageToVideoPipeline), image.shape[-1]
    shape = {"height": side, "width": side, "num_frames": 9 if cog else 5}
    given = {"guidance_scale": 3.5, "num_inference_steps": 4, "output_type": kind, **shape, **options}
    levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    # CogVideoX's pipeline makes as many copies of the latents as images are given.
    pil = [Image.fromarray(levels)] * 2 if cog else Image.fromarray(levels)
    length, latents = (COG_LENGTH, x.transpose(1, 2)) if cog else (LENGTH, x)
    made = pipe(image=pil, prompt=list(PROMPTS), latents=latents, max_sequence_length=length, **given).frames
    return made.transpose(1, 2) if cog and kind == "latent" else made


@pytest.fixture(autouse=True)
def _means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give CogVideoX's pipeline the mean of the image's latents, as we take it, in the place of a draw."""
    mean = lambda encoded, generator=None: encoded.latent_dist.mode()  # noqa: E731
    monkeypatch.setattr(pipeline_cogvideox_image2video, "retrieve_latents", mean)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sample_from_a_first_frame_is_that_of_the_pipeline(models: BuiltModels, name: str) -> None:
    generator, pipe = load(models, name), load_pipe(models[name])
    image, x = picture(SIDE.get(name, 16)), noise(2, *generator.latent_shape)
    expected, plain = draw(pipe, image, x), generator.encode_prompts(PROMPTS)
    cond = generator.with_first_frame(plain, image[None])
    drawn = sample(generator, cond, steps=4, guidance=3.5, latents=x).latents
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    videos = draw(pipe, image, x, "pt")
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(drawn), videos, rtol=1e-4, atol=1e-4)
    other = generator.with_first_frame(plain, torch.zeros_like(image)[None])
    assert (sample(generator, other, steps=4, guidance=3.5, latents=x).latents - drawn).abs().max() > 1e-3
    assert generator.takes_first_frame and generator.needs_first_frame == (name != "wan ti2v as text")


@pytest.mark.parametrize("name", BUILDERS)
def test_one_prediction_is_that_of_the_pipelines_network(
    models: BuiltModels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, pipe = load(models, name), load_pipe(models[name])
    image, x = picture(SIDE.get(name, 16)), noise(2, *generator.latent_shape)
    given: list[Any] = []
    forward = type(pipe.transformer).forward
    spy = lambda network, **inputs: (given.append((inputs, forward(network, **inputs))), given[-1][1])[1]  # noqa: E731
    monkeypatch.setattr(type(pipe.transformer), "forward", spy)
    draw(pipe, image, x, guidance_scale=1.0, num_inference_steps=1)
    theirs, (output,) = given.pop()
    cond = generator.with_first_frame(generator.encode_prompts(PROMPTS), image[None])
    t = theirs["timestep"].amax(-1, keepdim=True).expand(2, -1)[:, 0] if name.startswith("wan") else theirs["timestep"]
    with torch.no_grad():
        found = generator.predict(x, t, cond)
    ours, _ = given.pop()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5)
    expected = output.transpose(1, 2) if name.startswith("cogvideox") else output
    first = 1 if generator.keeps_first_frame else 0  # the pipeline overwrites what it predicts there
    torch.testing.assert_close(found[:, :, first:], expected[:, :, first:], rtol=1e-5, atol=1e-5)


def test_what_is_given_is_checked(models: BuiltModels) -> None:
    generator = load(models, "cogvideox 5b")
    plain, x = generator.encode_prompts(PROMPTS), noise(2, *generator.latent_shape)
    with pytest.raises(PipelineError, match=r"makes videos of a first frame; give it by generator\.with_first_frame"):
        sample(generator, plain, steps=2, guidance=1.0, latents=x)
    with pytest.raises(PipelineError, match="one for all: got 3"):
        generator.with_first_frame(plain, torch.zeros(3, 3, 16, 16))
    with pytest.raises(PipelineError, match=r"of this model are \[3, 16, 16\], got \[3, 8, 8\]"):
        generator.with_first_frame(plain, torch.zeros(1, 3, 8, 8))
    two = generator.with_first_frame(plain, torch.stack([picture(), picture(seed=1)]))
    for row, seed in enumerate((0, 1)):
        alone = generator.with_first_frame(plain[row], picture(seed=seed)[None])
        torch.testing.assert_close(two.first_frame[row], alone.first_frame[0])


def test_the_first_latents_of_ti2v_are_kept_and_have_no_gradient(models: BuiltModels) -> None:
    generator = load(models, "wan ti2v as text")
    generator.add_adapter(2)
    moved(generator)
    given, x0 = picture(32)[None], noise(2, *generator.latent_shape)
    cond = generator.with_first_frame(generator.encode_prompts(PROMPTS), given)
    clean = generator.encode(given[:, None])
    x0[:, :, :1] = clean
    t, eps = torch.tensor([900.0, 120.0]), noise(2, *generator.latent_shape, seed=1)
    x_t, target = generator.process.add_noise(x0, eps, t), generator.process.target(x0, eps, t)
    output = generator.predict(x_t, t, cond)
    torch.testing.assert_close(output[:, :, :1], target[:, :, :1], rtol=1e-4, atol=1e-4)
    still = generator.predict(x0, torch.zeros(2), cond)  # where methods that invert start
    assert bool(still.isfinite().all()) and bool((still[:, :, :1] == 0).all())
    # Published training leaves the first latents out of the mean; here they count as 0 in it: 1 of 2 frames is left.
    errors = (output - target).square()
    whole, cut = (
        torch.autograd.grad(loss, generator.trainable_parameters(), retain_graph=True)
        for loss in (errors.mean(), errors[:, :, 1:].mean())
    )
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other / 2, rtol=1e-4, atol=1e-7)
    drawn = sample(generator, cond, steps=4, guidance=3.5, latents=eps).latents
    torch.testing.assert_close(drawn[:, :, :1], clean.expand(2, -1, -1, -1, -1), rtol=1e-5, atol=1e-5)


def test_learned_positions_are_for_one_geometry(models: BuiltModels) -> None:
    for video, said in (
        (VideoOptions(frames=17), "has learned positions for 9 frames alone, not 17"),
        (VideoOptions(32, 16, 9), "has learned positions for frames of 16 x 16 alone, not 32 x 16"),
    ):
        with pytest.raises(PipelineError, match=said):
            load_generator(models["cogvideox 5b"], device="cpu", video=video)


def test_networks_with_other_inputs_are_refused(models: BuiltModels, tmp_path: Path) -> None:
    for name, changes, said in (
        ("wan 2.1", {"image_dim": None}, "takes no image embeddings, or those of a last frame too"),
        ("wan 2.1", {"pos_embed_seq_len": 10}, "takes no image embeddings, or those of a last frame too"),
        ("cogvideox 5b", {"in_channels": 4}, "takes 4 channels; an image-to-video model of an autoencoder with 4"),
    ):
        path = Path(BUILDERS[name](tmp_path / "model"))
        config = path / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        with pytest.raises(PipelineError, match=said):
            load_generator(str(path), device="cpu")


@pytest.mark.parametrize("name", ["wan 2.1", "cogvideox 5b"])
def test_a_lora_loads_in_the_plain_pipeline(models: BuiltModels, tmp_path: Path, name: str) -> None:
    generator, pipe = load(models, name), load_pipe(models[name])
    image, x = picture(), noise(2, *generator.latent_shape)
    generator.add_adapter(4, alpha=8.0)
    moved(generator).save_lora(tmp_path / "lora")
    cond = generator.with_first_frame(generator.encode_prompts(PROMPTS), image[None])
    drawn, plain = sample(generator, cond, steps=4, guidance=3.5, latents=x).latents, draw(pipe, image, x)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn, draw(pipe, image, x), rtol=1e-4, atol=1e-4)
    assert (drawn - plain).abs().max() > 1e-2
