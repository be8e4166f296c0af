from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from pipelines import Generator, PipelineError, load_generator, sample

PROMPTS = ["a red circle", "two blue stars"]


def media(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_facts(generator: Generator) -> None:
    assert generator.latent_shape == (4, 8, 8) and generator.image_size == 16
    assert generator.dtype == torch.float32 and generator.family in ("sd", "sdxl")
    assert str(generator.attention).startswith("sdpa (8 x AttnProcessor2_0")


def test_encoding_equals_the_autoencoder(generator: Generator) -> None:
    vae = generator.encoder("vae")
    mean, std = generator.encode_posterior(media())
    encoded = vae.encode(media() * 2 - 1)
    if hasattr(encoded, "latents"):
        assert vae.config.scaling_factor == 1.0
        assert torch.equal(mean, encoded.latents) and not std.any()
    else:
        assert torch.allclose(mean, encoded.latent_dist.mean * 0.18215) and (std > 0).all()
        assert torch.allclose(std, encoded.latent_dist.std * 0.18215)
    assert torch.equal(generator.encode(media()), mean) and mean.dtype == torch.float32


def test_decoding_is_in_range_and_differentiable(generator: Generator) -> None:
    latents = (0.1 * torch.randn(2, *generator.latent_shape)).requires_grad_()
    images = generator.decode(latents)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in generator.encoder("vae").parameters())


def test_media_of_the_wrong_shape_are_refused(sd15: Generator) -> None:
    with pytest.raises((PipelineError, TypeError), match="media"):
        sd15.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(PipelineError, match="multiples of 2"):
        sd15.encode(torch.zeros(1, 3, 15, 16))


def test_channelwise_latent_scaling_round_trips(tiny_paths: dict[str, str], tmp_path: Path) -> None:
    path = shutil.copytree(tiny_paths["sdxl"], tmp_path / "model")
    config = json.loads((path / "vae" / "config.json").read_text())
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    (path / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": mean, "latents_std": std}))
    scaled, plain = load_generator(path), load_generator(tiny_paths["sdxl"])
    raw = plain.encode(media()) / 0.18215
    columns = [torch.tensor(value).reshape(1, 4, 1, 1) for value in (mean, std)]
    assert torch.allclose(scaled.encode(media()), (raw - columns[0]) / columns[1] * 0.18215, atol=1e-6)
    assert torch.allclose(scaled.decode(scaled.encode(media())), plain.decode(plain.encode(media())), atol=1e-5)


def test_distinct_prompts_are_encoded_once_and_in_order(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = generator._encode_batch
    monkeypatch.setattr(generator, "_encode_batch", lambda prompts: seen.append(len(prompts)) or original(prompts))
    cond = generator.encode_prompts(["red", "blue star", "red", ""])
    assert seen == [3] and len(cond) == 4
    assert torch.equal(cond.prompt_embeds[0], cond.prompt_embeds[2])
    assert torch.allclose(cond.prompt_embeds[1], generator.encode_prompts(["blue star"]).prompt_embeds[0], atol=1e-5)


def test_prompts_must_be_a_list(sd15: Generator) -> None:
    with pytest.raises(PipelineError, match="at least one"):
        sd15.encode_prompts([])
    with pytest.raises(PipelineError, match=r"write \[prompt\]"):
        sd15.encode_prompts("red")


def test_encoders_load_lazily_and_can_be_freed(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not generator._encoders
    first = sample(generator, generator.encode_prompts(PROMPTS), steps=2, seeds=[1, 2])
    cond = generator.encode_prompts(PROMPTS)
    images = generator.decode(first.latents)
    generator.load_encoders()
    loaded = dict(generator._encoders)
    generator.load_encoders()
    assert all(generator._encoders[name] is module for name, module in loaded.items())
    generator.free_encoders()
    assert not generator._encoders
    # Guidance needs "" again: it was encoded once and kept, so the denoiser can be sampled without the encoders.
    again = sample(generator, cond, steps=2, seeds=[1, 2])
    assert torch.equal(again.latents, first.latents) and not generator._encoders
    assert torch.equal(generator.decode(again.latents), images) and set(generator._encoders) == {"vae"}


def test_ids_follow_content_not_place(tiny_paths: dict[str, str], tmp_path: Path) -> None:
    original = load_generator(tiny_paths["sd15"])
    path = shutil.copytree(tiny_paths["sd15"], tmp_path / "copy")
    config_path = path / "vae" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "_diffusers_version": "9.9", "_name_or_path": "elsewhere"}))
    copy = load_generator(path)
    assert (copy.vae_id, copy.text_id) == (original.vae_id, original.text_id)
    config_path.write_text(json.dumps({**config, "scaling_factor": 0.5}))
    changed = load_generator(path)
    assert changed.vae_id != original.vae_id and changed.text_id == original.text_id
    weights = path / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load_generator(path).text_id != original.text_id
    assert load_generator(tiny_paths["sd2"]).vae_id != original.vae_id


def test_saved_directory_is_plain_diffusers(generator: Generator, tmp_path: Path) -> None:
    with torch.no_grad():
        generator.network.conv_out.bias += 0.25
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("{}")
    for _ in range(2):  # saving over an earlier save is as good
        generator.save(tmp_path / "out")
    assert not generator._encoders and (tmp_path / "out" / "metrics.jsonl").exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".tmp")]
    assert not list((tmp_path / "out").glob(".saving-*"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipe(PROMPTS, num_inference_steps=3, guidance_scale=7.5, output_type="latent", generator=seeds).images
    again = load_generator(tmp_path / "out")
    ours = sample(again, again.encode_prompts(PROMPTS), steps=3, seeds=[1, 2])
    assert (ours.latents - expected).abs().max() < 1e-4
    assert again.vae_id == generator.vae_id and again.text_id == generator.text_id
    with pytest.raises(PipelineError, match="refusing to save over"):
        again.save(tmp_path / "out")


def test_gradient_checkpointing_gives_the_same_gradient(sd15: Generator) -> None:
    cond, t = sd15.encode_prompts(PROMPTS), torch.tensor([10, 800])
    x = torch.randn(2, *sd15.latent_shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(2):
        weight = sd15.network.conv_in.weight
        gradients.append(torch.autograd.grad(sd15.predict(x, t, cond).square().mean(), weight)[0])
        sd15.enable_gradient_checkpointing()
        sd15.network.train()
    assert torch.allclose(*gradients, atol=1e-6) and sd15.network.is_gradient_checkpointing
