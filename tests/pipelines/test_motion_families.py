"""AnimateDiff and CogVideoX against diffusers' own pipelines, on tiny models of their real classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_tools import moved, noise
from tiny_models import BuiltModels, build_tiny_sd
from tiny_motion import LENGTH, build_tiny_animatediff, build_tiny_cogvideox

from pipelines import PipelineError, VideoOptions, load_generator, sample
from pipelines.load import fingerprint_model

PROMPTS = ["a red circle", "two blue stars above the green square"]
BUILDERS: dict[str, Callable[[Path], str]] = {
    "animatediff": build_tiny_animatediff,
    "animatediff v": lambda path: build_tiny_animatediff(path, "v_prediction"),
    "cogvideox 2b": lambda path: build_tiny_cogvideox(path, "2b"),
    "cogvideox 5b": build_tiny_cogvideox,
    "cogvideox 1.5": lambda path: build_tiny_cogvideox(path, "1.5"),
}
ONE_EACH = ["animatediff", "cogvideox 5b"]
SHAPES = {"animatediff": (2, 4, 5, 8, 8), "cogvideox": (2, 4, 3, 2, 2), "cogvideox 1.5": (2, 4, 4, 2, 2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> BuiltModels:
    return BuiltModels(tmp_path_factory.mktemp("motion"), BUILDERS)


def noise_for(name: str) -> torch.Tensor:
    return noise(*SHAPES.get(name, SHAPES[name.split()[0]]))


def load(path: str, **options: Any) -> Any:
    frames = 5 if "animatediff" in str(path) else 9
    return load_generator(path, device="cpu", **{"video": VideoOptions(frames=frames), **options})


def load_pipe(path: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    if "cogvideox" in type(pipe).__name__.lower():  # 5B and 1.5 ship a solver with noise of its own
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def draw(pipe: Any, x: torch.Tensor, kind: str = "latent", **options: Any) -> torch.Tensor:
    """Return the latents, or the videos, that the pipeline samples from noise `x`, channels first."""
    cog = hasattr(pipe, "transformer")
    given = {"num_frames": 9, "max_sequence_length": LENGTH} if cog else {"num_frames": x.shape[2]}
    given |= {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": kind, **options}
    made = pipe(prompt=list(PROMPTS), latents=x.transpose(1, 2) if cog else x, **given).frames
    return made.transpose(1, 2) if cog and kind == "latent" else made


def network_call(pipe: Any, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Return the output of the pipeline's network, asked as the pipeline asks it."""
    if not hasattr(pipe, "transformer"):
        frames = embeds.repeat_interleave(x.shape[2], dim=0)
        return pipe.unet(x, t, encoder_hidden_states=frames).sample
    rotary = pipe.transformer.config.use_rotary_positional_embeddings
    sides = [8 * side for side in x.shape[-2:]]
    positions = pipe._prepare_rotary_positional_embeddings(*sides, x.shape[2], "cpu") if rotary else None
    given = {"encoder_hidden_states": embeds, "timestep": t, "image_rotary_emb": positions}
    return pipe.transformer(x.transpose(1, 2), **given).sample.transpose(1, 2)


def encode(pipe: Any) -> torch.Tensor:
    """Return what the pipeline makes of the prompts."""
    if hasattr(pipe, "transformer"):
        return pipe.encode_prompt(PROMPTS, None, False, max_sequence_length=LENGTH)[0]
    return pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]


@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_and_one_prediction_are_those_of_the_pipeline(models: BuiltModels, name: str) -> None:
    generator, pipe, x, t = load(models[name]), load_pipe(models[name]), noise_for(name), torch.tensor([700, 31])
    cond, embeds = generator.encode_prompts(PROMPTS), encode(pipe)
    torch.testing.assert_close(cond.prompt_embeds, embeds, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = network_call(pipe, x, t, embeds)
        torch.testing.assert_close(generator.predict(x, t, cond), expected, rtol=1e-5, atol=1e-5)
        for wrong in (-expected, network_call(pipe, x, 1000 - t, embeds), network_call(pipe, x.flip(2), t, embeds)):
            assert (generator.predict(x, t, cond) - wrong).abs().max() > 1e-3
        assert (generator.predict(x, t, cond[[1, 0]]) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_whole_sample_is_that_of_the_pipeline(models: BuiltModels, name: str, guidance: float) -> None:
    generator, pipe, x = load(models[name]), load_pipe(models[name]), noise_for(name)
    expected = draw(pipe, x, guidance_scale=guidance)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=guidance, latents=x).latents
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert drawn.shape == x.shape == (2, *generator.latent_shape)
    videos = draw(pipe, x, "pt", guidance_scale=guidance)
    assert videos.shape == (2, *generator.media_shape)
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(drawn), videos, rtol=1e-4, atol=1e-4)


def test_a_flow_of_motion_is_sampled_as_by_euler(tmp_path: Path) -> None:
    path = build_tiny_animatediff(tmp_path / "animatediff", "flow_prediction")
    generator, pipe, x = load(path), load_pipe(path), noise_for("animatediff")
    assert (
        generator.process.prediction == "flow" and "5 frames of 16 x 16 pixels at 8 a second" in generator.describe()
    )
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.scale_model_input, pipe.scheduler.init_noise_sigma = lambda x, t: x, 1.0
    pipe.scheduler.set_timesteps = lambda n, device: FlowMatchEulerDiscreteScheduler.set_timesteps(
        pipe.scheduler, n, sigmas=[1.0, 0.75, 0.5, 0.25]
    )
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents
    torch.testing.assert_close(drawn, draw(pipe, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_latents_are_those_of_the_autoencoder_both_ways(models: BuiltModels, name: str) -> None:
    generator, pipe = load(models[name]), load_pipe(models[name])
    media = torch.rand(2, *generator.media_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, std = generator.encode_posterior(media)
        assert mean.shape == std.shape == (2, *generator.latent_shape)
        if name.startswith("animatediff"):
            own = pipe.vae.encode(2 * media.flatten(0, 1) - 1).latent_dist
            theirs, spread = (one.unflatten(0, (2, 5)).transpose(1, 2) for one in (own.mean, own.std))
        else:
            own = pipe.vae.encode(2 * media.transpose(1, 2) - 1).latent_dist
            theirs, spread = own.mean, own.std
        extra = mean.shape[2] - theirs.shape[2]
        assert extra == (name == "cogvideox 1.5")
        scale = pipe.vae.config.scaling_factor
        torch.testing.assert_close(mean[:, :, extra:], theirs * scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[:, :, extra:], spread * scale, rtol=1e-4, atol=1e-5)
        if extra:  # the published training code repeats the first frame
            assert torch.equal(mean[:, :, 0], mean[:, :, 1])
        if name.startswith("animatediff"):
            expected = pipe.decode_latents(mean).transpose(1, 2)
        else:
            expected = pipe.decode_latents(mean[:, :, extra:].transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(generator.decode(mean), (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_frames_are_decoded_in_chunks(models: BuiltModels, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, latents = load(models["animatediff"]), noise(2, 4, 5, 8, 8)
    with torch.no_grad():
        whole, moments = generator.decode(latents), generator.encode_posterior(noise(2, 5, 3, 16, 16).sigmoid())
        monkeypatch.setattr("pipelines.families.animatediff.CHUNK", 3)
        torch.testing.assert_close(generator.decode(latents), whole, rtol=1e-4, atol=1e-5)
        chunked = generator.encode_posterior(noise(2, 5, 3, 16, 16).sigmoid())
    torch.testing.assert_close(chunked, moments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["animatediff", "cogvideox 5b", "cogvideox 1.5"])
def test_frames_can_be_decoded_alone_and_with_a_gradient(models: BuiltModels, name: str) -> None:
    generator, latents = load(models[name]), noise_for(name).requires_grad_()
    whole, cut = generator.decode(latents), int(name == "cogvideox 1.5")
    chosen, pictures = [cut, cut + 1, cut + 2], [0, 1, 2] if name == "animatediff" else [0, 4, 8]
    part = generator.decode_frames(latents, chosen)
    torch.testing.assert_close(part, whole[:, pictures], rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(whole[:, pictures].sum(), latents)[0]
    torch.testing.assert_close(torch.autograd.grad(part.sum(), latents)[0], expected, rtol=1e-3, atol=1e-4)
    checkpointed = generator.decode_checkpointed(latents)
    torch.testing.assert_close(checkpointed, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(checkpointed.square().sum(), latents)[0],
        torch.autograd.grad(generator.decode(latents).square().sum(), latents)[0],
        rtol=1e-3,
        atol=1e-4,
    )


def test_later_frames_of_cogvideox_are_decoded_with_their_pair(models: BuiltModels) -> None:
    """The autoencoder decodes latent frames 0-2, 3-4, 5-6; a window is one frame before the pair, and the pair."""
    generator, latents = load(models["cogvideox 5b"]), noise(1, 4, 7, 2, 2)
    with torch.no_grad():
        whole = generator.decode(latents)
        found = generator.decode_frames(latents, [3, 4, 5, 6])
        for place, start, picture in ((0, 2, 4), (1, 2, 8), (2, 4, 4), (3, 4, 8)):
            window = generator.decode(latents[:, :, start : start + 3])
            torch.testing.assert_close(found[:, place], window[:, picture])
        assert whole.shape[1] == 25


@pytest.mark.parametrize(
    ("name", "video", "said"),
    [
        ("animatediff", {"frames": 9}, r"takes videos of at most 8 frames, not 9; nearest: 8\."),
        ("animatediff", {"height": 17}, r"multiples of 2, not 17 x 16; the nearest size is 16 x 16\."),
        ("cogvideox 5b", {"frames": 13}, r"takes videos of 8k \+ 1 frames, not 13; nearest: 17\."),
        ("cogvideox 5b", {"frames": 9, "width": 24}, r"multiples of 16, not 16 x 24; the nearest size is 16 x 32\."),
        (
            "cogvideox 1.5",
            {"frames": 9, "height": 32},
            r"frames of at most 16 x 16, not 32 x 16; the nearest size is 16 x 16\.",
        ),
    ],
)
def test_a_geometry_that_does_not_fit_names_the_nearest(models: BuiltModels, name: str, video: Any, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        load(models[name], video=VideoOptions(**video))


def test_the_geometry_is_the_pipelines_own_unless_chosen(models: BuiltModels) -> None:
    assert load(models["animatediff"], video=None).media_shape == (8, 3, 16, 16)
    own = load(models["cogvideox 5b"], video=None)
    assert own.media_shape == (9, 3, 16, 16) and own.fps == 8 and own.modality == "video"
    newer = load(models["cogvideox 1.5"], video=None)
    assert newer.latent_shape == (4, 4, 2, 2) and newer.fps == 16
    assert newer.describe() == "cogvideox: 9 frames of 16 x 16 pixels at 16 a second, 16 text tokens"
    wide = load(models["cogvideox 5b"], video=VideoOptions(height=32, width=48, frames=17))
    pipe, x = load_pipe(models["cogvideox 5b"]), noise(2, *wide.latent_shape)
    assert wide.latent_shape == (4, 5, 4, 6)
    drawn = sample(wide, wide.encode_prompts(PROMPTS), steps=3, guidance=3.0, latents=x).latents
    expected = draw(pipe, x, num_frames=17, height=32, width=48, num_inference_steps=3)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "targets", "layers"),
    [
        ("animatediff", None, 4 * 2 * 4 + 7 * 2 * 4),  # attention of the image: 4 blocks; of motion: 7
        ("animatediff", ["motion"], 7 * 2 * 4),
        ("animatediff", ["image"], 4 * 2 * 4),
        ("cogvideox 5b", None, 2 * 4),
        ("cogvideox 1.5", None, 2 * 4),
    ],
)
def test_a_lora_loads_in_the_plain_pipeline(
    models: BuiltModels, tmp_path: Path, name: str, targets: list[str] | None, layers: int | None
) -> None:
    generator, x = load(models[name]), noise_for(name)
    generator.add_adapter(4, alpha=8.0, target_modules=targets)
    assert len(moved(generator).trainable_parameters()) == 2 * layers
    generator.save_lora(tmp_path / "lora")
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents
    pipe = load_pipe(models[name])
    plain = draw(pipe, x)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn, draw(pipe, x), rtol=1e-4, atol=1e-4)
    assert (drawn - plain).abs().max() > 1e-2
    again = load(str(tmp_path / "lora"), video=generator.video)
    torch.testing.assert_close(
        sample(again, again.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents,
        drawn,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_saved_model_is_a_plain_pipeline(models: BuiltModels, tmp_path: Path, name: str) -> None:
    generator, x = load(models[name]), noise_for(name)
    generator.add_adapter(4)
    moved(generator).save(tmp_path / name)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents
    torch.testing.assert_close(draw(load_pipe(str(tmp_path / name)), x), drawn, rtol=1e-4, atol=1e-4)
    again = load(str(tmp_path / name), video=generator.video)
    torch.testing.assert_close(
        sample(again, again.encode_prompts(PROMPTS), steps=4, guidance=3.0, latents=x).latents,
        drawn,
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_u_net_and_a_motion_adapter_apart_are_joined_as_diffusers_does(models: BuiltModels, tmp_path: Path) -> None:
    """The whole model of `build_tiny_animatediff` was made of these two."""
    base, folder = build_tiny_sd(tmp_path / "sd"), tmp_path / "animatediff"
    DiffusionPipeline.from_pretrained(base).save_pretrained(folder)
    whole = Path(models["animatediff"])
    index = json.loads((whole / "model_index.json").read_text())
    for kept in ("motion_adapter", "scheduler"):
        shutil.copytree(whole / kept, folder / kept, dirs_exist_ok=True)
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    generator, joined, x = load(str(folder)), load(models["animatediff"]), noise_for("animatediff")
    cond, t = generator.encode_prompts(PROMPTS), torch.tensor([600, 20])
    with torch.no_grad():
        torch.testing.assert_close(generator.predict(x, t, cond), joined.predict(x, t, cond))
    assert generator.most_frames == 8
    assert generator.model_id != joined.model_id
    generator.save(tmp_path / "saved-animatediff")
    saved = json.loads((tmp_path / "saved-animatediff" / "model_index.json").read_text())
    assert saved["unet"][1] == "UNetMotionModel" and saved["motion_adapter"] == [None, None]
    drawn = sample(generator, cond, steps=4, guidance=3.0, latents=x).latents
    pipe = load_pipe(str(tmp_path / "saved-animatediff"))
    torch.testing.assert_close(draw(pipe, x), drawn, rtol=1e-4, atol=1e-4)
    assert fingerprint_model(folder) != fingerprint_model(tmp_path / "saved-animatediff")
