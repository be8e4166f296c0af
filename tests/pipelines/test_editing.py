"""SDEdit: starting from given latents, against closed forms and diffusers' own image- and video-to-video pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXVideoToVideoPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    WanVideoToVideoPipeline,
)
from flow_tools import noise
from tiny_models import BuiltModels, build_tiny_sd, build_tiny_sd3, tiny_scheduler
from tiny_motion import LENGTH, build_tiny_animatediff, build_tiny_cogvideox
from tiny_videos import GEOMETRY, build_tiny_ltx, build_tiny_wan

from pipelines import NoiseProcess, PipelineError, VideoOptions, editing, load_generator, sample, sdedit, start_step
from pipelines.flow import FlowOptions

PROMPTS = ["a red circle", "two blue stars above the green square"]
SEEDS = [3, 4]
STEPS = 5
BUILDERS: dict[str, Callable[[Path], str]] = {
    "sd": build_tiny_sd,
    "sd v": lambda path: build_tiny_sd(path, "v_prediction"),
    "sd3": build_tiny_sd3,
    "wan": build_tiny_wan,
    "wan experts": lambda path: build_tiny_wan(path, experts=True),
    "ltx": build_tiny_ltx,
    "cogvideox 2b": lambda path: build_tiny_cogvideox(path, "2b"),
    "cogvideox 1.5": lambda path: build_tiny_cogvideox(path, "1.5"),
    "animatediff": build_tiny_animatediff,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> BuiltModels:
    return BuiltModels(tmp_path_factory.mktemp("models"), BUILDERS)


def load(path: str) -> Any:
    name = Path(path).name
    options: dict[str, Any] = {}
    if name == "sd3":
        options["flow"] = FlowOptions(image_size=16)
    if name.startswith(("wan", "ltx")):
        options |= {"flow": FlowOptions(text_length=48), "video": VideoOptions(**GEOMETRY)}
    if name.startswith("cogvideox"):
        options["video"] = VideoOptions(frames=9)
    if name == "animatediff":
        options["video"] = VideoOptions(frames=5)
    return load_generator(path, device="cpu", **options)


def uneven_process() -> tuple[NoiseProcess, Any]:
    process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    return process, process.schedule(10, sigmas=[1.0 - index / 10 for index in range(10)])


def test_the_start_is_the_highest_level_at_or_below_the_strength() -> None:
    process, grid = uneven_process()
    sigmas = [3 * s / (1 + 2 * s) for s in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)]
    for strength in (0.65, 0.7, 0.75, 0.8, 0.2, 0.1, 0.0, *sigmas):
        expected = next((step for step, sigma in enumerate(sigmas) if sigma <= strength + 1e-9), 10)
        assert start_step(process, grid, strength) == expected
    with pytest.raises(PipelineError, match=r"strength must lie in 0\.\.1"):
        start_step(process, grid, 1.01)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_where_steps_are_even_and_their_share_is_whole_the_start_is_that_of_diffusers(spacing: str) -> None:
    scheduler = DDIMScheduler.from_config(tiny_scheduler("epsilon").config, timestep_spacing=spacing)
    process = NoiseProcess.from_scheduler(scheduler)
    for steps in (10, 20, 50):
        for run in range(steps + 1):
            assert start_step(process, process.schedule(steps), run / steps) == steps - run


@pytest.mark.parametrize("name", BUILDERS)
def test_strength_0_keeps_the_latents_1_forgets_them_and_between_depends_on_both(
    models: BuiltModels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(models[name])
    cond = generator.encode_prompts(PROMPTS)
    clean, other = noise(2, *generator.latent_shape, seed=1), noise(2, *generator.latent_shape, seed=2)

    def draw(latents: torch.Tensor, strength: float, seeds: list[int] = SEEDS) -> torch.Tensor:
        drawn = sdedit(generator, cond, latents, strength=strength, seeds=seeds, steps=STEPS, guidance=1.0)
        return drawn.latents

    assert torch.equal(draw(clean, 0.0), clean)
    whole = sample(generator, cond, seeds=SEEDS, steps=STEPS, guidance=1.0).latents
    assert torch.equal(draw(clean, 1.0), whole)
    started: list[torch.Tensor] = []
    real = editing.sample

    def watched(*args: Any, **options: Any) -> Any:
        started.append(options["latents"])
        assert options["segment"].start == start_step(generator.process, options["steps"], 0.75)
        return real(*args, **options)

    monkeypatch.setattr(editing, "sample", watched)
    middle = draw(clean, 0.75)
    assert torch.equal(draw(clean, 0.75), middle) and draw(clean, 0.75, [5, 6]).sub(middle).abs().max() > 1e-3
    assert (draw(other, 0.75) - middle).abs().max() > 1e-3 and torch.isfinite(middle).all()
    eps = torch.stack([torch.randn(*clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    alpha, sigma = closed_form(generator, 0.75)
    expected = alpha * clean.double() + sigma * eps.double()
    assert 0 < alpha < 1 and (started[0].double() - expected).abs().max() < 2e-6


def closed_form(generator: Any, strength: float) -> tuple[float, float]:
    """Return alpha and sigma of the start in float64: of a flow from the level, of diffusion from the betas."""
    levels = generator.schedule(STEPS, generator.latent_shape).levels.tolist()
    if generator.process.prediction == "flow":
        sigma = max(level / 1000 for level in levels if level / 1000 <= strength + 1e-6)
        return 1 - sigma, sigma
    t = max(int(level) for level in levels if (level + 1) / 1000 <= strength + 1e-9)
    betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2 for i in range(1000)]
    bars = [math.prod(1 - beta for beta in betas[: i + 1]) for i in (0, t, 999)]
    if generator.family != "cogvideox":
        return math.sqrt(bars[1]), math.sqrt(1 - bars[1])
    shift = generator.process._scheduler.config.snr_shift_scale
    first, own, last = (math.sqrt(bar / (shift + (1 - shift) * bar)) for bar in bars)
    alpha = (own - last) * first / (first - last)  # rescaled so that the last level is pure noise
    return alpha, math.sqrt(1 - alpha**2)


@pytest.mark.parametrize(("strength", "steps"), [(0.7, 10), (0.5, 4)])
def test_an_image_is_that_of_diffusers_image_to_image(models: BuiltModels, strength: float, steps: int) -> None:
    generator = load(models["sd"])
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(models["sd"])
    pipe.set_progress_bar_config(disable=True)
    clean = noise(2, 4, 8, 8, seed=1)
    random = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    given = {"strength": strength, "num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "pt"}
    expected = pipe(prompt=list(PROMPTS), image=clean, generator=random, **given).images
    drawn = sdedit(
        generator, generator.encode_prompts(PROMPTS), clean, strength=strength, seeds=SEEDS, steps=steps, guidance=3.0
    )
    assert len(drawn.timesteps) == round(steps * strength)
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(drawn.latents), expected, rtol=1e-4, atol=1e-4)


def test_a_real_video_is_that_of_diffusers_video_to_video(models: BuiltModels) -> None:
    """Wan's grid is shifted by 3: half of its 4 steps run from level 0.6."""
    generator = load(models["wan"])
    pipe = WanVideoToVideoPipeline.from_pretrained(models["wan"])
    pipe.set_progress_bar_config(disable=True)
    video = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 48}
    random = [torch.Generator().manual_seed(7)]
    prompt = PROMPTS[:1]
    options = {"strength": 0.5, "generator": random, "output_type": "latent", **given}
    expected = pipe(video=video[None], prompt=prompt, **options).frames
    with torch.no_grad():
        clean = generator.encode(video[None])
    level = float(generator.schedule(4).levels[2]) / 1000
    assert level == pytest.approx(3 * 0.3353 / (1 + 2 * 0.3353), abs=1e-3)
    drawn = sdedit(
        generator, generator.encode_prompts(prompt), clean, strength=level, seeds=[7], steps=4, guidance=5.0
    )
    torch.testing.assert_close(drawn.latents, expected, rtol=1e-4, atol=1e-4)


def test_latents_of_a_video_lead_where_cogvideox_video_to_video_leads(models: BuiltModels) -> None:
    generator = load(models["cogvideox 2b"])
    pipe = CogVideoXVideoToVideoPipeline.from_pretrained(models["cogvideox 2b"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    clean = noise(2, *generator.latent_shape, seed=1)
    eps = torch.stack([torch.randn(*clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    pipe.scheduler.set_timesteps(5)
    noised = pipe.scheduler.add_noise(clean, eps, pipe.scheduler.timesteps[2:3])
    given = {"num_inference_steps": 5, "guidance_scale": 3.0, "max_sequence_length": LENGTH, "strength": 0.6}
    given |= {"height": 16, "width": 16}
    made = pipe(prompt=list(PROMPTS), latents=noised.transpose(1, 2), output_type="latent", **given).frames
    drawn = sdedit(
        generator, generator.encode_prompts(PROMPTS), clean, strength=0.6, seeds=SEEDS, steps=5, guidance=3.0
    )
    torch.testing.assert_close(drawn.latents, made.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_a_batch_is_split_and_noise_of_the_steps_is_that_of_the_seed(models: BuiltModels) -> None:
    generator = load(models["sd"])
    cond, clean = generator.encode_prompts(PROMPTS), noise(2, 4, 8, 8)
    options = {"strength": 0.6, "steps": STEPS, "guidance": 1.0, "eta": 1.0}
    both = sdedit(generator, cond, clean, seeds=SEEDS, **options).latents
    split = sdedit(generator, cond, clean, seeds=SEEDS, batch_size=1, **options).latents
    torch.testing.assert_close(split, both, rtol=1e-5, atol=1e-5)
    with pytest.raises(PipelineError, match="1 latents but 2 prompts"):
        sdedit(generator, cond, clean[:1], seeds=SEEDS, **options)
    with pytest.raises(PipelineError, match="'dpm\\+\\+' is for inference only"):
        sdedit(generator, cond, clean, seeds=SEEDS, strength=0.5, steps=STEPS, solver="dpm++")
