"""What Qwen-Image and FLUX.2 klein have of their own: guidance by tokens, masks, grids, latents; against diffusers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_tools import LENGTH, PROMPTS, Models, draw, load, load_pipe, noise, noise_for

from pipelines import FlowOptions, PipelineError, guided_predictor, load_generator, sample
from pipelines.families import qwen_image
from pipelines.families.flux import pack
from pipelines.families.flux2 import empirical_mu, patchify, positions, unpatchify
from pipelines.load import FAMILIES, family_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return Models(tmp_path_factory.mktemp("qwen"))


def test_guidance_keeps_the_norm_of_each_token(models: dict[str, str]) -> None:
    """By hand: v_u + 3 (v_c - v_u) of a token (2, 0, 0, 0) against (0, 2, 0, 0) is (6, -4, 0, 0), to be of norm 2."""
    generator = load(models["qwen_image"])
    prompt, without = torch.zeros(2, 1, 1, 2, 4, dtype=torch.float64)
    prompt[0, 0, 0, 0], without[0, 0, 0, 1] = 2.0, 2.0
    prompt[0, 0, 1, 3] = -1.0  # the second token, where nothing is said without a prompt
    guided = generator.guide(prompt, without, 3.0)
    expected = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    expected[0, 0, 0, :2] = torch.tensor([6.0, -4.0], dtype=torch.float64) * 2.0 / math.sqrt(52.0)
    expected[0, 0, 1, 3] = -1.0
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(generator.guide(0 * prompt, 0 * without, 3.0), 0 * prompt)


def test_training_sees_the_guidance_of_sampling(models: dict[str, str]) -> None:
    """The predictor of updates is the pipeline's combination, has its gradient, and is not the linear one."""
    generator, x, t = load(models["qwen_image"]), noise(2, 16, 8, 8), torch.tensor([700.0, 300.0])
    cond = generator.encode_prompts(PROMPTS)
    guided = guided_predictor(generator, cond, 4.0)(x, t)
    with_prompt, without = generator.predict(x, t, cond), generator.predict(x, t, generator.encode_prompts([" "] * 2))
    linear = without + 4.0 * (with_prompt - without)
    tokens = pack(linear)
    expected = tokens * (pack(with_prompt).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(pack(guided), expected, rtol=1e-4, atol=1e-5)
    assert (guided - linear).abs().max() > 0.01
    (gradient,) = torch.autograd.grad(guided.square().sum(), generator.network.proj_out.weight)
    assert gradient.abs().max() > 0


def test_the_prefix_of_the_template_is_dropped(models: dict[str, str]) -> None:
    generator = load(models["qwen_image"])
    tokenizer = generator.encoder("tokenizer")
    assert len(tokenizer(qwen_image.TEMPLATE.partition("{}")[0])["input_ids"]) == qwen_image.PREFIX == 34
    cond = generator.encode_prompts(PROMPTS)
    assert cond.prompt_embeds.shape == (2, LENGTH, 16)
    lengths = [len(tokenizer(qwen_image.TEMPLATE.format(prompt))["input_ids"]) - 34 for prompt in PROMPTS]
    assert cond.mask is not None and cond.mask.sum(1).tolist() == lengths and lengths[0] < lengths[1]
    assert not cond.prompt_embeds[~cond.mask].any()
    assert generator.unconditional().mask.sum() == lengths[0] - len(tokenizer(PROMPTS[0])["input_ids"]) + 1


def test_padding_does_not_count_where_diffusers_heeds_no_mask(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers 0.36 takes lengths of one batch and attends to the padding: prompts of one length go together."""
    if not qwen_image.masks_text():
        pytest.skip("this diffusers is such a one")
    generator, x, t = load(models["qwen_image"]), noise(3, 16, 8, 8), torch.tensor([700.0, 300.0, 500.0])
    cond, network, calls = generator.encode_prompts([*PROMPTS, "a new disc!!"]), generator.network, []
    with torch.no_grad():
        expected = generator.predict(x, t, cond)

        def old(*, txt_seq_lens: list[int], **given: Any) -> Any:
            assert given.pop("encoder_hidden_states_mask") is None
            calls.append(txt_seq_lens)
            return network(**given)

        monkeypatch.setattr(qwen_image, "masks_text", lambda: False)
        monkeypatch.setattr(type(generator), "dtype", torch.float32)
        generator.network = old
        torch.testing.assert_close(generator.predict(x, t, cond), expected, rtol=1e-5, atol=1e-5)
    assert [len(call) for call in calls] == [2, 1]


@pytest.mark.parametrize("name", ["qwen_image", "flux2"])
def test_images_go_through_the_autoencoder_and_back(models: dict[str, str], name: str) -> None:
    generator, pipe = load(models[name]), load_pipe(models[name])
    media = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    frames = (2 * media - 1).unsqueeze(2) if name == "qwen_image" else 2 * media - 1
    with torch.no_grad():
        found = pipe.vae.encode(frames).latent_dist
        mean, std = generator.encode_posterior(media)
        if name == "qwen_image":
            centre, spread = (torch.tensor(pipe.vae.config[key]) for key in ("latents_mean", "latents_std"))
            raw_mean, raw_std = found.mean[:, :, 0], found.std[:, :, 0]
        else:
            centre, spread = pipe.vae.bn.running_mean, (pipe.vae.bn.running_var + 1e-4).sqrt()
            raw_mean = pipe._patchify_latents(found.mode())
            raw_std = torch.zeros_like(raw_mean)  # diffusers' training script draws no sample of the posterior
        centre, spread = centre.reshape(1, -1, 1, 1), spread.reshape(1, -1, 1, 1)
        torch.testing.assert_close(mean, (raw_mean - centre) / spread, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, raw_std / spread, rtol=1e-5, atol=1e-6)
        expected = (pipe.vae.decode(found.mean, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        expected = expected[:, :, 0] if name == "qwen_image" else expected
        torch.testing.assert_close(generator.decode(mean), expected, rtol=1e-4, atol=1e-5)
    latents = mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(generator.decode_checkpointed(latents, 1).sum(), latents)
    torch.testing.assert_close(gradient, torch.autograd.grad(generator.decode(latents).sum(), latents)[0])
    assert bool(gradient.any())


def test_patches_are_diffusers_and_their_inverse() -> None:
    klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein").Flux2KleinPipeline
    x = noise(2, 4, 4, 6)
    assert torch.equal(patchify(x), klein._patchify_latents(x))
    assert torch.equal(unpatchify(patchify(x)), x)
    assert torch.equal(positions(2, 3), klein._prepare_latent_ids(noise(1, 1, 2, 3))[0].float())


def test_shifts_of_flux2_are_diffusers_with_their_jump(models: dict[str, str]) -> None:
    theirs = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein").compute_empirical_mu
    golden = {(1024, 50): 1.7020, (4096, 50): 2.0234, (4096, 28): 2.1514, (1024, 4): 2.0307, (4096, 4): 2.2912}
    golden |= {(4300, 50): 2.0447, (4301, 50): 1.1847}
    for (tokens, steps), mu in golden.items():
        assert empirical_mu(tokens, steps) == pytest.approx(mu, abs=5e-5)
        assert empirical_mu(tokens, steps) == pytest.approx(theirs(tokens, steps), rel=1e-12)
    generator = load(models["flux2"])
    # 16 tokens and 4 steps: exp(mu) / (exp(mu) + 1 / sigma - 1) for sigma = 3/4.
    factor = math.exp(theirs(16, 4))
    for schedule in (generator.process.schedule(4), generator.schedule(4, (16, 4, 4))):
        assert schedule.levels[1].item() == pytest.approx(1000 * factor / (factor + 1 / 3), rel=1e-5)
    assert "mu 1.596 at 50 steps and 16 tokens, which falls to 1.185 above 4300 tokens" in generator.describe()


def test_levels_of_qwen_image_are_shifted_and_stretched(models: dict[str, str]) -> None:
    process = load(models["qwen_image"]).process
    assert [process.mu_for(tokens) for tokens in (1024, 4096)] == pytest.approx([0.5387, 0.6935], abs=5e-5)
    process.mu = process.mu_for(4096)
    levels, factor = process.schedule(4).levels.double() / 1000, math.exp(0.6935484)
    shifted = [factor / (factor + 1 / sigma - 1) for sigma in (1.0, 0.75, 0.5, 0.25)]
    stretch = (1 - shifted[-1]) / (1 - 0.02)
    assert levels.tolist() == pytest.approx([1 - (1 - sigma) / stretch for sigma in shifted], rel=1e-5)
    assert levels[-1].item() == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen_image", "flux2"])
def test_wide_images_are_those_of_the_pipeline(models: dict[str, str], name: str) -> None:
    generator, pipe, x = load(models[name]), load_pipe(models[name]), noise(2, 16, 8, 12)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=1.0, latents=x)
    expected = draw(pipe, x, num_inference_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(drawn.latents, expected, rtol=1e-4, atol=1e-4)


def test_distilled_models_take_no_guidance(models: dict[str, str]) -> None:
    base, distilled = family_of(models["flux2"]), family_of(models["flux2 distilled"])
    assert (base.guidance_inside, distilled.guidance_inside) == (False, True) and base.family == distilled.family
    generator = load(models["flux2 distilled"])
    with pytest.raises(PipelineError, match="without classifier-free guidance: give guidance 1, not 4"):
        sample(generator, generator.encode_prompts(PROMPTS), steps=1, guidance=4.0, latents=noise_for("flux2"))


@pytest.mark.parametrize("name", ["qwen_image", "flux2"])
def test_sizes_lengths_and_guidance_are_checked(models: dict[str, str], name: str) -> None:
    generator = load(models[name])
    with pytest.raises(PipelineError, match="multiples of 4, not 18 x 31; the nearest size is 16 x 32"):
        generator.encode(torch.zeros(1, 3, 18, 31))
    with pytest.raises(PipelineError, match="has no embedded guidance"):
        load_generator(models[name], device="cpu", flow=FlowOptions(embedded_guidance=3.5))
    longest = 1024 if name == "qwen_image" else 512
    with pytest.raises(PipelineError, match=rf"text_length must lie in 1\.\.{longest} tokens, got 2000"):
        load_generator(models[name], device="cpu", flow=FlowOptions(text_length=2000))
    assert load_generator(models[name], device="cpu").image_size == 256  # diffusers' default of 128 latents
    if name == "qwen_image":
        with pytest.raises(PipelineError, match="not 18 x 16; the nearest size is 16 x 16"):
            generator.predict(noise(1, 16, 9, 8), torch.tensor([500.0]), generator.encode_prompts(["a star"]))


def test_qwen_images_of_other_kinds_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["qwen_image"], tmp_path / "copy")
    file = tmp_path / "copy" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": True}))
    with pytest.raises(PipelineError, match="has guidance_embeds, which is not supported; use Qwen-Image itself"):
        load(str(tmp_path / "copy"))


def test_an_older_diffusers_is_named_by_the_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "Flux2OfTheFuture", FAMILIES["Flux2KleinPipeline"])
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2OfTheFuture"}))
    with pytest.raises(PipelineError, match=r"FLUX.2 klein needs diffusers 0.37 or newer, and .* is installed"):
        family_of(tmp_path)


@pytest.mark.parametrize(("name", "length"), [("qwen_image", 98), ("z_image", 64), ("flux2", 64)])
def test_prompts_that_are_cut_are_counted_and_shown(models: dict[str, str], name: str, length: int) -> None:
    with pytest.warns(UserWarning, match=f"1 of 1 prompts exceed {length} tokens and were cut, such as 'zebra zebra"):
        load(models[name]).encode_prompts(["zebra " * 20])


@pytest.mark.parametrize("name", ["z_image", "flux2"])
def test_a_chat_format_that_fails_is_one_line(models: dict[str, str], name: str) -> None:
    generator = load(models[name])
    generator.encoder("tokenizer").chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(PipelineError, match="tokenizer: its chat format fails .*; fetch the model again.$"):
        generator.encode_prompts(["a star"])
