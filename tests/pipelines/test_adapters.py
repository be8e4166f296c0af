from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import Generator, PipelineError, adapters, load_generator, sample

PROMPTS = ["a red circle", "two blue stars"]


def predict(generator: Generator) -> torch.Tensor:
    x = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return generator.predict(x, torch.tensor([10, 800]), generator.encode_prompts(PROMPTS))


def predict_frozen(generator: Generator) -> torch.Tensor:
    """As an adapter finds the weights: torch chooses a kernel for strided inputs by whether weights want gradients."""
    generator.network.requires_grad_(False)
    return predict(generator)


def train(generator: Generator, seed: int = 0) -> None:
    """Stand in for training: give B values that matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in generator.network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))


def test_a_new_adapter_changes_nothing_and_alone_is_trainable(generator: Generator) -> None:
    everything = len(generator.trainable_parameters())
    assert everything == len(list(generator.network.parameters())) and not generator.has_adapter
    before = predict_frozen(generator)
    generator.add_adapter(4)
    assert generator.has_adapter and torch.equal(predict(generator), before)
    names = {name for name, parameter in generator.network.named_parameters() if parameter.requires_grad}
    assert len(names) == len(generator.trainable_parameters()) == 2 * 4 * 8 and all(".lora_" in name for name in names)
    targets = {name.split(".lora_")[0].split("attn")[-1].split(".", 1)[1] for name in names}
    assert targets == {"to_q", "to_k", "to_v", "to_out.0"}


def test_adapter_weights_depend_on_the_seed_alone(tiny_paths: dict[str, str]) -> None:
    def weights(seed: int, disturb: int) -> torch.Tensor:
        torch.manual_seed(disturb)
        generator = load_generator(tiny_paths["sd15"])
        generator.add_adapter(4, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in generator.trainable_parameters()])

    first = weights(0, disturb=1)
    assert torch.equal(first, weights(0, disturb=2)) and not torch.equal(first, weights(1, disturb=1))
    assert first[first != 0].std().item() == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_an_adapter_starts_as_its_distribution_says(init: adapters.Init) -> None:
    network = torch.nn.ModuleDict({"to_q": torch.nn.Linear(3000, 7), "conv": torch.nn.Conv2d(300, 5, 3)})
    adapters.add_adapter(network, 8, targets=["to_q", "conv"], init=init)
    linear, conv = (p.detach() for name, p in adapters.lora_parameters(network) if "lora_A" in name)
    for drawn, inputs in ((linear, 3000), (conv, 300 * 9)):
        std = 1 / 8 if init == "gaussian" else (3 * inputs) ** -0.5
        assert drawn.std().item() == pytest.approx(std, rel=0.03)
        assert abs(drawn.mean().item()) < 4 * std / drawn.numel() ** 0.5
        assert (drawn.abs().max().item() <= inputs**-0.5) == (init == "kaiming")


def test_disabled_adapter_is_the_base_to_the_bit(generator: Generator) -> None:
    base = predict_frozen(generator)
    generator.add_adapter(4)
    train(generator)
    tuned = predict(generator)
    trainable = [id(parameter) for parameter in generator.trainable_parameters()]
    with generator.adapter_disabled():
        assert torch.equal(predict(generator), base)
        with generator.adapter_disabled():
            pass
        assert torch.equal(predict(generator), base)
    assert torch.equal(predict(generator), tuned) and (tuned - base).abs().max() > 1e-2
    assert [id(parameter) for parameter in generator.trainable_parameters()] == trainable


def test_disabling_within_a_step_keeps_the_policy_gradient(sd15: Generator) -> None:
    sd15.add_adapter(4)
    train(sd15)
    x = torch.randn(2, *sd15.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t = sd15.encode_prompts(PROMPTS), torch.tensor([10, 800])
    policy = sd15.predict(x, t, cond)
    with sd15.adapter_disabled(), torch.no_grad():
        reference = sd15.predict(x, t, cond)
    gradients = torch.autograd.grad((policy - reference).square().mean(), sd15.trainable_parameters())
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_scale_interpolates(sd15: Generator) -> None:
    base = predict(sd15)
    with pytest.raises(PipelineError, match="carries no LoRA adapter to scale"):
        sd15.set_adapter_scale(0.5)
    sd15.add_adapter(2)
    train(sd15)
    tuned = predict(sd15)
    sd15.set_adapter_scale(0.0)
    assert torch.allclose(predict(sd15), base, atol=1e-6)
    sd15.set_adapter_scale(0.25)
    quarter = predict(sd15)
    sd15.set_adapter_scale(1.0)
    assert torch.equal(predict(sd15), tuned)
    with torch.no_grad():  # W + scale * B A with scale 1/4 is W + (B / 4) A
        for name, parameter in sd15.network.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.25)
    torch.testing.assert_close(predict(sd15), quarter, atol=1e-6, rtol=0)
    assert min((quarter - base).abs().max(), (quarter - tuned).abs().max()) > 1e-3


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_plain_diffusers_loads_the_adapter(generator: Generator, tmp_path: Path, alpha: float | None) -> None:
    generator.add_adapter(3, alpha=alpha)
    train(generator)
    generator.save_lora(tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(generator.root)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipe(PROMPTS, num_inference_steps=4, guidance_scale=5.0, output_type="latent", generator=seeds).images
    cond = generator.encode_prompts(PROMPTS)
    ours = sample(generator, cond, steps=4, guidance=5.0, seeds=[1, 2]).latents
    assert (ours - expected).abs().max() < 1e-4
    with generator.adapter_disabled():
        assert (sample(generator, cond, steps=4, guidance=5.0, seeds=[1, 2]).latents - expected).abs().max() > 1e-2
    # The directory is a model in its own right: base and adapter.
    again = load_generator(tmp_path / "lora")
    assert again.has_adapter and again.name_or_path == generator.name_or_path
    assert (sample(again, cond, steps=4, guidance=5.0, seeds=[1, 2]).latents - expected).abs().max() < 1e-4
    assert len(again.trainable_parameters()) == len(generator.trainable_parameters())
    explicit = load_generator(generator.root, adapter=tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert torch.allclose(predict(explicit), predict(again), atol=1e-5)


def test_saving_merges_the_adapter(generator: Generator, tmp_path: Path) -> None:
    generator.add_adapter(3, alpha=6.0)
    train(generator)
    tuned = predict(generator)
    generator.save(tmp_path / "merged")
    assert torch.equal(predict(generator), tuned) and generator.has_adapter
    merged = load_generator(tmp_path / "merged")
    assert not merged.has_adapter and torch.allclose(predict(merged), tuned, atol=1e-4)
    assert merged.network.state_dict().keys() == load_generator(generator.root).network.state_dict().keys()


def test_what_is_written(sd15: Generator, tmp_path: Path) -> None:
    sd15.add_adapter(3)
    sd15.save_lora(tmp_path, base_model="org/base")
    names = ["lora_kohya.safetensors", "mmalign.json", "pytorch_lora_weights.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "mmalign.json").read_text()) == {"base_model": "org/base", "family": "sd", "rank": 3}
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118
        assert file.metadata()


def test_the_same_weights_make_the_same_bytes(sd15: Generator, tmp_path: Path) -> None:
    sd15.add_adapter(3)
    contents = set()
    for attempt in range(8):
        sd15.save_lora(tmp_path / str(attempt), base_model="org/base")
        contents.add((tmp_path / str(attempt) / "pytorch_lora_weights.safetensors").read_bytes())
    assert len(contents) == 1
    saved = load_file(tmp_path / "0" / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(sd15.trainable_parameters())
    assert sorted(tensor.double().sum().item() for tensor in saved.values()) == sorted(
        parameter.double().sum().item() for parameter in sd15.trainable_parameters()
    )


def test_base_model_is_found_beside_the_adapter_or_by_the_resolver(
    tiny_paths: dict[str, str], sd15: Generator, tmp_path: Path
) -> None:
    sd15.add_adapter(3)
    sd15.save_lora(tmp_path / "lora", base_model="assets/some-model")
    loaded = load_generator(tmp_path / "lora", resolve=lambda name: {"assets/some-model": tiny_paths["sd15"]}[name])
    assert loaded.has_adapter
    (tmp_path / "lora" / "assets").mkdir()
    (tmp_path / "lora" / "assets" / "some-model").symlink_to(tiny_paths["sd15"])
    assert load_generator(tmp_path / "lora").has_adapter


def test_adapter_in_low_precision_trains_in_float32(tiny_paths: dict[str, str]) -> None:
    generator = load_generator(tiny_paths["sd15"], dtype="bf16")
    generator.add_adapter(2)
    assert {parameter.dtype for parameter in generator.trainable_parameters()} == {torch.float32}
    assert generator.dtype == torch.bfloat16 and predict(generator).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_wrong_adapters_are_one_clear_line(tiny_paths: dict[str, str], sd15: Generator, tmp_path: Path) -> None:
    def refused(pattern: str, **options: object) -> None:
        with pytest.raises(PipelineError, match=pattern) as caught:
            load_generator(**{"name_or_path": tiny_paths["sd15"], **options})
        assert "\n" not in str(caught.value)

    sd15.add_adapter(3)
    sd15.save_lora(tmp_path / "lora")
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    refused("no adapter at", adapter=tmp_path / "nowhere")
    refused("does not fit", name_or_path=tiny_paths["sdxl"], adapter=weights)
    state = load_file(weights)
    for name, key in {"text": "text_encoder.a.lora_A.weight", "other": None}.items():
        (tmp_path / name).mkdir()
        changed = (
            {**state, key: torch.zeros(3, 4)}
            if key
            else {key.replace("unet", "transformer"): value for key, value in state.items()}
        )
        save_file(changed, tmp_path / name / weights.name)
    refused("also changes text_encoder", adapter=tmp_path / "text")
    refused("holds no LoRA for this kind of model", adapter=tmp_path / "other")
    stray = {
        f"unet.nowhere.to_q.lora_{side}.weight": torch.zeros(shape) for side, shape in (("A", (3, 8)), ("B", (8, 3)))
    }
    save_file({**state, **stray}, tmp_path / "stray.safetensors")
    refused("adapts 33 layers but only 32", adapter=tmp_path / "stray.safetensors")
    (tmp_path / "lora" / "mmalign.json").unlink()
    refused("base model is unknown", name_or_path=tmp_path / "lora")


def test_wrong_uses_are_one_clear_line(sd15: Generator, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no adapter to switch off"):
        sd15.adapter_disabled()
    with pytest.raises(PipelineError, match="no adapter to save"):
        sd15.save_lora(tmp_path)
    with pytest.raises(PipelineError, match="matches the adapter target 'to_qq'.*Did you mean 'to_q'"):
        sd15.add_adapter(4, target_modules=["to_k", "to_qq"])
    with pytest.raises(PipelineError, match="at least 1"):
        sd15.add_adapter(0)
    sd15.add_adapter(4)
    with pytest.raises(PipelineError, match="already carries"):
        sd15.add_adapter(4)
