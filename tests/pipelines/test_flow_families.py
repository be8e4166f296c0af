"""Flow families against diffusers' own pipelines, on tiny models of their real classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from flow_tools import (
    BUILDERS,
    LENGTH,
    OPTIONS,
    PROMPTS,
    Models,
    draw,
    encode,
    load,
    load_pipe,
    moved,
    network_call,
    noise,
    noise_for,
)
from safetensors.torch import load_file
from tiny_models import build_tiny_sd

from pipelines import PipelineError, load_generator, sample
from pipelines.attention import set_attention
from pipelines.errors import MissingDependencyError
from pipelines.families.flux import pack, positions, unpack
from pipelines.flow import Density, FlowOptions
from pipelines.load import family_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return Models(tmp_path_factory.mktemp("flow"))


@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_and_one_prediction_are_those_of_the_pipeline(models: dict[str, str], name: str) -> None:
    generator, pipe, x = load(models[name]), load_pipe(models[name]), noise_for(name)
    cond, t = generator.encode_prompts(PROMPTS), torch.tensor([700.0, 31.5])
    embeds, second = encode(pipe)
    if cond.mask is None:
        torch.testing.assert_close(cond.prompt_embeds, embeds, rtol=1e-5, atol=1e-5)
        if cond.pooled is not None:
            torch.testing.assert_close(cond.pooled, second, rtol=1e-5, atol=1e-5)
    for row, kept in enumerate([] if cond.mask is None else cond.mask):
        theirs = embeds[row] if name == "z_image" else embeds[row][second[row].bool()]
        torch.testing.assert_close(cond.prompt_embeds[row][kept], theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = network_call(pipe, x, t, embeds, second)
        torch.testing.assert_close(generator.predict(x, t, cond), expected, rtol=1e-5, atol=1e-5)
        # Neither sign, time nor prompt is taken lightly.
        for wrong in (-expected, network_call(pipe, x, 1000 - t, embeds, second)):
            assert (generator.predict(x, t, cond) - wrong).abs().max() > 1e-3
        assert (generator.predict(x, t, cond[[1, 0]]) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *((name, 1.0) for name in ("sd3", "flux", "schnell", "z_image", "qwen_image", "flux2", "flux2 distilled")),
        *((name, 4.5) for name in ("sd3", "sd3 t5", "z_image", "qwen_image", "flux2")),
    ],
)
def test_a_whole_sample_is_that_of_the_pipeline(models: dict[str, str], name: str, guidance: float) -> None:
    generator, pipe, x = load(models[name]), load_pipe(models[name]), noise_for(name)
    scale = {} if name in ("flux", "schnell") else {"guidance_scale": guidance}
    expected = draw(pipe, x, num_inference_steps=5, **scale)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=5, guidance=guidance, latents=x)
    torch.testing.assert_close(drawn.latents, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.5 and float((expected[0] - expected[1]).abs().max()) > 0.5


def test_wide_images_are_shifted_by_their_own_size(models: dict[str, str]) -> None:
    """FLUX.1-dev shifts by the number of tokens: 16 of the model's own images here, 60 of these."""
    generator, pipe, x = load(models["flux"]), load_pipe(models["flux"]), noise(2, 16, 12, 20)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), steps=4, guidance=1.0, latents=x)
    torch.testing.assert_close(drawn.latents, draw(pipe, x, num_inference_steps=4), rtol=1e-4, atol=1e-4)
    own, wide = generator.schedule(4), generator.schedule(4, (16, 12, 20))
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (60 - 256)
    assert wide.levels[1].item() == pytest.approx(1000 / (1 + torch.exp(torch.tensor(-mu)).item() / 3), rel=1e-5)
    assert wide.levels[1] > own.levels[1]


def test_embedded_guidance_reaches_the_network_and_true_guidance_needs_a_negative(models: dict[str, str]) -> None:
    pipe, x = load_pipe(models["flux"]), noise(2, 16, 8, 8)
    other = load_generator(models["flux"], device="cpu", flow=FlowOptions(16, LENGTH, embedded_guidance=1.0))
    cond = other.encode_prompts(PROMPTS)
    drawn = sample(other, cond, steps=3, guidance=1.0, latents=x).latents
    torch.testing.assert_close(drawn, draw(pipe, x, num_inference_steps=3, guidance_scale=1.0), rtol=1e-4, atol=1e-4)
    own = load(models["flux"])
    assert (sample(own, cond, steps=3, guidance=1.0, latents=x).latents - drawn).abs().max() > 1e-4
    with pytest.raises(PipelineError, match="without classifier-free guidance: give guidance 1, not 4"):
        sample(own, cond, steps=3, guidance=4.0, latents=x)
    negative = own.encode_prompts(["a blue star"])
    guided = sample(own, cond, steps=3, guidance=4.0, negative=negative, latents=x).latents
    expected = draw(pipe, x, num_inference_steps=3, true_cfg_scale=4.0, negative_prompt=["a blue star"] * 2)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


def test_packing_is_diffusers_and_its_inverse(models: dict[str, str]) -> None:
    pipe, x = load_pipe(models["flux"]), noise(2, 16, 4, 6)
    assert torch.equal(pack(x), pipe._pack_latents(x, 2, 16, 4, 6))
    assert torch.equal(unpack(pack(x), 4, 6), x)
    assert torch.equal(positions(4, 6), pipe._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32))


@pytest.mark.parametrize("name", ["sd3 t5", "flux", "z_image", "qwen_image", "flux2"])
def test_unequal_prompts_of_a_batch_are_those_of_singles(models: dict[str, str], name: str) -> None:
    generator, x, t = load(models[name]), noise_for(name), torch.tensor([400.0, 800.0])
    cond = generator.encode_prompts(PROMPTS)
    with torch.no_grad():
        together = generator.predict(x, t, cond)
        for row, prompt in enumerate(PROMPTS):
            alone = generator.encode_prompts([prompt])
            torch.testing.assert_close(alone.prompt_embeds[0], cond.prompt_embeds[row], rtol=1e-5, atol=1e-6)
            single = generator.predict(x[row : row + 1], t[row : row + 1], alone)[0]
            torch.testing.assert_close(single, together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_latents_are_shifted_and_scaled_both_ways(models: dict[str, str], name: str) -> None:
    generator, pipe = load(models[name]), load_pipe(models[name])
    media = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean = pipe.vae.encode(2 * media - 1).latent_dist.mean
        latents = generator.encode(media)
        torch.testing.assert_close(latents, (mean - 0.06) * 1.5, rtol=1e-5, atol=1e-6)
        expected = (pipe.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(generator.decode(latents), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_sizes_that_do_not_fit_name_the_nearest(models: dict[str, str], name: str) -> None:
    generator = load(models[name])
    sides = r"multiples of 4 up to 32" if name == "sd3" else "multiples of 4"
    with pytest.raises(PipelineError, match=rf"sides that are {sides}, not 18 x 31; the nearest size is 16 x 32"):
        generator.encode(torch.zeros(1, 3, 18, 31))
    with pytest.raises(PipelineError, match="the nearest size is 20 x 20"):
        load_generator(models[name], device="cpu", flow=FlowOptions(image_size=21))
    if name == "sd3":
        with pytest.raises(PipelineError, match="the nearest size is 32 x 32"):
            load_generator(models[name], device="cpu", flow=FlowOptions(image_size=64))
        assert load_generator(models[name], device="cpu").latent_shape == (16, 8, 8)
    else:
        assert load_generator(models[name], device="cpu").image_size == 256  # diffusers' default of 128 latents
        with pytest.raises(PipelineError, match="not 18 x 16; the nearest size is 16 x 16"):
            generator.predict(noise(1, 16, 9, 8), torch.tensor([500.0]), generator.encode_prompts(["a star"]))


def test_z_image_is_as_large_as_its_positions_and_its_text_as_its_tokenizer(
    models: dict[str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["z_image"], tmp_path / "small")
    for file, changes in (
        ("transformer/config.json", {"axes_lens": [512, 8, 8]}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 24}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    generator = load_generator(str(folder), device="cpu")
    assert generator.image_size == 32  # 8 patches of 2 x 2 latents, of 2 x 2 pixels each
    assert generator.encode_prompts(["a star"]).prompt_embeds.shape[1] == 24
    with pytest.raises(PipelineError, match="multiples of 4 up to 32, not 64 x 64; the nearest size is 32 x 32"):
        load_generator(str(folder), device="cpu", flow=FlowOptions(image_size=64))
    file = folder / "tokenizer" / "tokenizer_config.json"
    for length, message in ((None, "480 text tokens"), ("many", "model_max_length is 'many'"), (0, "is '0'; allowed")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
        if length is None:
            assert message in load_generator(str(folder), device="cpu").describe()
        else:
            with pytest.raises(PipelineError, match=message):
                load_generator(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        (
            "z_image",
            "transformer/config.json",
            {"axes_lens": [64, 64, 64]},
            "text_length must lie in 1..32 tokens, got 64",
        ),
        ("z_image", "tokenizer/tokenizer_config.json", {"pad_token": None}, "pad_token is 'None'; allowed: a token"),
        ("qwen_image", "vae/config.json", {"latents_mean": None}, "latents_mean must hold 16 numbers, one a channel"),
        ("qwen_image", "vae/config.json", {"latents_std": [1.0]}, "latents_std must hold 16 numbers, one a channel"),
        ("sd3", "scheduler/scheduler_config.json", {"shift": 0}, "shift is '0'; allowed: a number above 0"),
    ],
)
def test_odd_values_of_configurations_are_named(
    models: dict[str, str], tmp_path: Path, name: str, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(models[name], tmp_path / "odd")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(PipelineError, match=message):
        load(str(folder)).encode_prompts(["a star"])


def test_a_language_model_without_its_head_encodes_alike(models: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(models["flux2"], tmp_path / "headless")
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder": ["transformers", "Qwen3Model"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    whole, headless = (load(str(path)).encode_prompts(["a star"]) for path in (models["flux2"], folder))
    assert torch.equal(whole.prompt_embeds, headless.prompt_embeds)


def test_options_that_a_model_does_not_have_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    for model in (models["sd3"], models["schnell"]):
        with pytest.raises(PipelineError, match="has no embedded guidance"):
            load_generator(model, device="cpu", flow=FlowOptions(embedded_guidance=3.5))
    with pytest.raises(PipelineError, match=r"text_length must lie in 1\.\.512 tokens, got 600"):
        load_generator(models["sd3"], device="cpu", flow=FlowOptions(text_length=600))
    with pytest.raises(PipelineError, match="is a StableDiffusionPipeline, which has no flow options"):
        load_generator(build_tiny_sd(tmp_path / "sd"), device="cpu", flow=FlowOptions())
    copy = tmp_path / "channels"
    shutil.copytree(models["flux"], copy)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"in_channels": 128}))
    with pytest.raises(PipelineError, match="takes 32 channels, its autoencoder gives 16; inpainting"):
        load_generator(copy, device="cpu")
    (copy / "model_index.json").write_text(
        json.dumps(json.loads((copy / "model_index.json").read_text()) | {"text_encoder_2": [None, None]})
    )
    with pytest.raises(PipelineError, match="lacks text_encoder_2, which 'flux' models need"):
        load_generator(copy, device="cpu")
    with pytest.raises(MissingDependencyError, match="xformers"):
        load(models["flux"], attention="xformers")


def test_the_family_is_known_from_the_index_alone(models: dict[str, str], tmp_path: Path) -> None:
    for name, family in (("sd3", "sd3"), ("schnell", "flux"), ("qwen_image", "qwen_image"), ("flux2", "flux2")):
        copy = tmp_path / name
        copy.mkdir()
        shutil.copy(Path(models[name]) / "model_index.json", copy)
        found = family_of(copy)
        assert found.family == family and found.is_flow


def test_attention_is_reported(models: dict[str, str]) -> None:
    reports = {name: load(models[name]).attention for name in ("sd3", "flux", "z_image")}
    assert [report.kernel for report in reports.values()] == ["sdpa"] * 3
    assert reports["sd3"].processors == {"JointAttnProcessor2_0": 2}
    assert reports["z_image"].processors == {"ZSingleStreamAttnProcessor": 3}
    flux = load(models["flux"])
    flux.network.set_attention_backend("_native_math")
    assert set_attention(flux.network).kernel == "sdpa"


def test_caches_know_the_text_length(models: dict[str, str]) -> None:
    short = load(models["sd3"])
    assert short.text_id != load_generator(models["sd3"], device="cpu").text_id
    assert short.encode_prompts(["a star"]).prompt_embeds.shape == (1, 16 + LENGTH, 40)


def test_a_prompt_that_t5_holds_is_not_called_cut(models: dict[str, str], recwarn: pytest.WarningsRecorder) -> None:
    """CLIP's tokenizer cuts at 16 here, T5's at 64."""
    generator, prompt = load(models["sd3 t5"]), "a zebra a zebra a zebra"
    assert len(generator.encoder("tokenizer")(prompt)["input_ids"]) > 16
    generator.encode_prompts([prompt])
    assert not [one for one in recwarn if "were cut" in str(one.message)]
    with pytest.warns(UserWarning, match="1 of 1 prompts exceed 64 tokens"):
        generator.encode_prompts(["zebra " * 20])
    with pytest.warns(UserWarning, match="1 of 1 prompts exceed 16 tokens"):
        load(models["sd3"]).encode_prompts([prompt])


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "qwen_image", "flux2"])
def test_a_lora_is_read_by_the_plain_pipeline(models: dict[str, str], name: str, tmp_path: Path) -> None:
    generator, x = load(models[name]), noise_for(name)
    scale = {} if name == "flux" else {"guidance_scale": 1.0}
    generator.add_adapter(4, alpha=8.0, seed=1)
    cond, t = generator.encode_prompts(PROMPTS), torch.tensor([700.0, 300.0])
    moved(generator)
    generator.save_lora(tmp_path / "lora")
    expected = sample(generator, cond, steps=3, guidance=1.0, latents=x).latents
    pipe = load_pipe(models[name])
    before = draw(pipe, x, num_inference_steps=3, **scale)
    pipe.load_lora_weights(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    found = draw(pipe, x, num_inference_steps=3, **scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.01
    names = set(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))
    layers = {
        "z_image": "layers.0.attention.to_q",
        "qwen_image": "transformer_blocks.1.attn.to_out.0",
        "flux2": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    }
    assert f"transformer.{layers.get(name, 'transformer_blocks.0.attn.add_q_proj')}.lora_A.weight" in names
    # SD3: 8 projections in the first block, of which the last lacks to_add_out; FLUX.1: 8 and 4 of the feed-forward
    # networks in its joint block, 3 projections in its single one; Z-Image: 4 in each of 3 blocks; Qwen-Image: 4 in
    # each of 2; FLUX.2: 4 in its joint block, 1 in its single one.
    counts = {"sd3": 8 + 7, "flux": 8 + 4 + 3, "z_image": 4 * 3, "qwen_image": 4 * 2, "flux2": 4 + 1}
    assert len(names) == 2 * counts[name]
    assert not (tmp_path / "lora" / "lora_kohya.safetensors").exists()
    with torch.no_grad():
        again = load_generator(tmp_path / "lora", device="cpu", flow=OPTIONS)
        torch.testing.assert_close(again.predict(x, t, cond), generator.predict(x, t, cond), rtol=1e-5, atol=1e-5)
    generator.save(tmp_path / "whole")
    merged = draw(
        load_pipe(str(tmp_path / "whole")),
        x,
        num_inference_steps=3,
        **scale,
    )
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_loras_of_other_kinds_of_models_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    unet = load_generator(build_tiny_sd(tmp_path / "sd"), device="cpu")
    unet.add_adapter(2)
    unet.save_lora(tmp_path / "unet-lora")
    file = tmp_path / "unet-lora" / "pytorch_lora_weights.safetensors"
    with pytest.raises(PipelineError, match=r"it has \['unet'\], not 'transformer'"):
        load(models["sd3"], adapter=file)


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "qwen_image", "flux2"])
def test_gradient_checkpointing_keeps_the_gradient(models: dict[str, str], name: str) -> None:
    generator = load(models[name])
    generator.add_adapter(2, seed=0)
    moved(generator).network.train()
    cond, x, t = generator.encode_prompts(PROMPTS), noise_for(name), torch.tensor([700.0, 300.0])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            generator.enable_gradient_checkpointing()
        loss = generator.predict(x, t, cond).square().mean()
        gradients.append(torch.autograd.grad(loss, generator.trainable_parameters()))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)
    assert any(bool(gradient.any()) for gradient in gradients[0])


@pytest.mark.parametrize("name", ["sd3 t5", "flux", "z_image", "qwen_image", "flux2"])
def test_half_precision_stays_near(models: dict[str, str], name: str) -> None:
    x, t, outputs = noise_for(name), torch.tensor([700.0, 300.0]), []
    for dtype in ("bf16", "fp32"):
        generator = load(models[name], dtype=dtype)
        with torch.no_grad():
            outputs.append(generator.predict(x, t, generator.encode_prompts(PROMPTS)))
    assert outputs[0].dtype == torch.float32
    assert 0 < float((outputs[0] - outputs[1]).abs().max()) < 0.2 * float(outputs[1].std())


def test_the_log_line_names_the_conventions(models: dict[str, str]) -> None:
    flow = FlowOptions(16, LENGTH, 2.0, Density("logit_normal"))
    assert load_generator(models["flux"], device="cpu", flow=flow).describe() == (
        "flux: 16 x 16 pixels, 64 text tokens, embedded guidance 2; sampling levels shifted by size, mu 0.4594;"
        " training levels logit_normal(0, 1) on the unshifted grid"
    )
