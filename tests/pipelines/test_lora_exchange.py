"""The exported LoRA as other tools read it, and theirs as mmalign reads it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from lora_tools import a1111_name, apply_by_hand, comfy_key_map, comfy_layers, kohya_keys
from safetensors.torch import load_file, save_file

from pipelines import PipelineError, adapters, load_generator
from pipelines.lora_files import KOHYA_NAME, WEIGHTS_NAME, LoraLayer, read_lora

EVERY = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONV = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]


def unet(kind: str, depths: tuple[int, ...] = (1, 1, 2)) -> Any:
    """A UNet with the blocks of SD1.5, SD2 or SDXL (of which `depths`: 1, 2, 10), eight to sixteen channels wide."""
    torch.manual_seed(0)
    common = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 8, "layers_per_block": 2}
    if kind == "sdxl":
        return UNet2DConditionModel(
            **common,
            block_out_channels=(8, 8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=depths,
            attention_head_dim=(2, 2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        ).eval()
    return UNet2DConditionModel(
        **common, block_out_channels=(8, 8, 16, 16), attention_head_dim=2, use_linear_projection=kind == "sd2"
    ).eval()


@torch.no_grad()
def output(network: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 3, 8, generator=random)
    added = {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}
    return network(x, torch.tensor([10, 800]), encoder_hidden_states=text, added_cond_kwargs=added).sample


@torch.no_grad()
def fill(network: Any, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))


def trained(base: Any, targets: list[str] | None, folder: Path, alpha: float = 1.5) -> torch.Tensor:
    """Write the LoRA of a copy of `base` into a folder and return what the copy predicts."""
    network = copy.deepcopy(base)
    adapters.add_adapter(network, 3, alpha, targets)
    fill(network)
    adapters.save_adapter(network, folder, {})
    return output(network)


def close(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> bool:
    moved = (wanted - base).abs().max()
    assert moved > 1e-2
    return bool((found - wanted).abs().max() < 1e-4 * max(1, wanted.abs().max()))


@pytest.mark.parametrize("targets", [None, EVERY + CONV], ids=["attention", "every"])
@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
def test_the_tools_find_every_layer_and_their_arithmetic_gives_our_model(
    kind: str, targets: list[str] | None, tmp_path: Path
) -> None:
    base = unet(kind, depths=(1, 2, 10) if targets is None else (1, 1, 2))
    wanted = trained(base, targets, tmp_path)
    state = load_file(tmp_path / KOHYA_NAME)
    keys = {key.split(".")[0] for key in state}
    known = comfy_key_map(base.config)
    assert keys <= set(known) and keys <= kohya_keys(base)
    if targets is None:
        assert len(keys) == {"sd15": 128, "sd2": 128, "sdxl": 560}[kind]
    else:
        assert {known[key] for key in keys} == set(layers_of(base, targets))
    original = {name.replace(".", "_"): own for name, own in comfy_layers(base.config).items()}
    if kind != "sdxl":
        assert {key: original[a1111_name(key)] for key in keys} == {key: known[key] for key in keys}
    plain = output(base)
    assert apply_by_hand(base, state, known) == len(keys)
    assert close(output(base), wanted, plain)


def layers_of(network: Any, targets: list[str]) -> list[str]:
    return [
        name
        for name, module in network.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets) and hasattr(module, "weight")
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", [WEIGHTS_NAME, KOHYA_NAME])
@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
def test_diffusers_reads_both_files_without_their_headers(kind: str, file: str, tmp_path: Path) -> None:
    base = unet(kind)
    plain, wanted = output(base), trained(base, EVERY + CONV, tmp_path)
    save_file(load_file(tmp_path / file), tmp_path / "bare.safetensors")
    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(str(tmp_path), weight_name="bare.safetensors", unet_config=base.config)
    pipeline.load_lora_into_unet(state, alphas, base)
    assert close(output(base), wanted, plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", [WEIGHTS_NAME, KOHYA_NAME])
def test_a_pipeline_loads_both_files(tiny_path: str, tmp_path: Path, file: str) -> None:
    generator = load_generator(tiny_path)
    generator.add_adapter(3, alpha=6.0, target_modules=EVERY)
    fill(generator.network)
    generator.save_lora(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tiny_path)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(tmp_path), weight_name=file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours = adapters.merged_copy(generator.network).state_dict()
    theirs = pipe.unet.state_dict()
    assert max((theirs[name] - before[name]).abs().max() for name in before) > 0.1
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-5) for name in before)


@pytest.mark.parametrize(
    "targets", [EVERY, ["conv_in", "conv_out", "linear_1", "to_q", *CONV]], ids=["linear", "conv"]
)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_both_files_load_back(kind: str, targets: list[str] | None, tmp_path: Path) -> None:
    base = unet(kind)
    plain, wanted = output(base), trained(base, targets, tmp_path)
    for file in (WEIGHTS_NAME, KOHYA_NAME):
        again = copy.deepcopy(base)
        adapters.load_adapters(again, [(tmp_path / file, 1.0)])
        assert close(output(again), wanted, plain)
    adapters.check_round_trip(again, lambda folder: adapters.save_adapter(again, folder, {}), tmp_path / "new")
    assert close(output(again), wanted, plain) and not list((tmp_path / "new").iterdir())


def test_an_export_that_would_not_load_is_refused_and_the_weights_stay(tmp_path: Path) -> None:
    network = unet("sd15")
    adapters.add_adapter(network, 3)

    def save(folder: Path) -> None:
        adapters.save_adapter(network, folder, {})
        state = load_file(folder / KOHYA_NAME)
        key = next(key for key in state if key.endswith(".alpha"))
        save_file({**state, key: state[key] * 2}, folder / KOHYA_NAME)

    with pytest.raises(PipelineError, match="lora_kohya.safetensors would give 1 of 128 layers another change"):
        adapters.check_round_trip(network, save, tmp_path)
    assert not any(parameter.any() for name, parameter in network.named_parameters() if "lora_B" in name)


def foreign(base: Any, scheme: str, folder: Path) -> Path:
    """Write a rank-2 LoRA of mixed layers in another tool's scheme; alpha 1, so that it must be read."""
    random = torch.Generator().manual_seed(3)
    original = {own: name for name, own in comfy_layers(base.config).items()}
    state, meta = {}, None
    for name in layers_of(base, ["to_q", "to_out.0", "ff.net.2", *(["conv1"] if scheme != "old" else [])]):
        if scheme == "old" and ".ff." in name:
            continue
        weight = base.get_submodule(name).weight
        down = 0.3 * torch.randn(2, *weight.shape[1:], generator=random)
        up = 0.3 * torch.randn(weight.shape[0], 2, *(1,) * (weight.ndim - 2), generator=random)
        under = name.replace(".", "_")
        if scheme in ("kohya", "ldm"):
            stem = "lora_unet_" + (under if scheme == "kohya" else original[name].replace(".", "_"))
            state |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(1.0),
            }
        elif scheme == "old":
            stem = "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0") + "_lora"
            state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up / 2}
        elif scheme == "peft":
            state |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        else:
            state |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
            meta = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1.0})}
    if scheme == "peft":
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    save_file(state, folder / ("adapter_model.safetensors" if scheme == "peft" else "x.safetensors"), metadata=meta)
    return folder


@pytest.mark.parametrize("scheme", ["kohya", "ldm", "diffusers", "old", "peft"])
def test_loras_of_other_tools_are_read(scheme: str, tmp_path: Path) -> None:
    base = unet("sd15")
    plain = output(base)
    folder = foreign(base, scheme, tmp_path)
    adapted = copy.deepcopy(base)
    adapters.load_adapters(adapted, [(folder, 1.0)])
    with torch.no_grad():  # the same draws once more, applied by hand
        random = torch.Generator().manual_seed(3)
        for name in layers_of(base, ["to_q", "to_out.0", "ff.net.2", *(["conv1"] if scheme != "old" else [])]):
            if scheme == "old" and ".ff." in name:
                continue
            weight = base.get_submodule(name).weight
            down = 0.3 * torch.randn(2, *weight.shape[1:], generator=random)
            up = 0.3 * torch.randn(weight.shape[0], 2, *(1,) * (weight.ndim - 2), generator=random)
            weight += 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    assert close(output(adapted), output(base), plain)


def test_several_loras_add_up_by_their_weights(tmp_path: Path) -> None:
    base = unet("sd15")
    files = []
    for number, targets in enumerate([EVERY, ["to_q", "conv1"]]):
        network = copy.deepcopy(base)
        adapters.add_adapter(network, 2 + number, 1.0, targets)
        fill(network, seed=number)
        adapters.save_adapter(network, tmp_path / str(number), {})
        files.append(tmp_path / str(number) / (KOHYA_NAME if number else WEIGHTS_NAME))
    given = list(zip(files, (0.5, -0.75), strict=True))
    network = copy.deepcopy(base)
    adapters.load_adapters(network, given)
    assert {layer.rank for layer in adapters.adapter_layers(network).values()} == {2, 3, 5}
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        for file, weight in given:
            for name, layer in read_lora(file, base).items():
                held = by_hand.get_submodule(name).weight
                held += weight * layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(held.shape)
    assert close(output(network), output(by_hand), output(base))
    adapters.set_adapter_scale(network, 0.0)
    assert torch.allclose(output(network), output(base), atol=1e-6)
    one = copy.deepcopy(base)
    adapters.load_adapters(one, [(files[0], 0.5)])
    half = copy.deepcopy(base)
    adapters.load_adapters(half, [(files[0], 1.0)])
    adapters.set_adapter_scale(half, 0.5)
    assert torch.equal(output(one), output(half))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("lora_unet_x.hada_w1_a", (2, 2), "is a LoHa, not a plain LoRA; merge it"),
        ("lora_unet_x.lokr_w1", (2, 2), "is a LoKr, not a plain LoRA; merge it"),
        ("lora_unet_x.lora_mid.weight", (2, 2), "LoCon with a Tucker decomposition"),
        ("lora_unet_x.diff", (2,), "full differences"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", (2, 2), "also changes lora_te1, which is not"),
        ("text_encoder_2.text_model.x.lora_A.weight", (2, 2), "also changes text_encoder_2"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", (2,), "DoRA in LyCORIS's layout"),
        ("lora_unet_nowhere.lora_up.weight", (2, 2), "adapts 129 layers but only 128 of them exist, not lora_unet_no"),
        ("lora_unet_conv_in.lora_up.weight", (2, 2), "lacks the 'down' matrix of conv_in"),
        ("lora_unet_conv_in.gate", (2, 2), "the tensor lora_unet_conv_in.gate is no part of a LoRA"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight", (9, 3), r"\[9, 3\] by"),
    ],
)
def test_what_is_no_plain_lora_is_one_line(key: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    base = unet("sd15")
    trained(base, None, tmp_path)
    state = load_file(tmp_path / KOHYA_NAME)
    save_file({**state, key: torch.ones(shape)}, tmp_path / "x.safetensors")
    with pytest.raises(PipelineError, match=message) as caught:
        adapters.load_adapters(base, [(tmp_path / "x.safetensors", 1.0)])
    assert "\n" not in str(caught.value) and not adapters.has_adapter(base)


def test_damaged_files_and_values_are_one_line(tmp_path: Path) -> None:
    base = unet("sd15")
    trained(base, None, tmp_path)
    state = load_file(tmp_path / KOHYA_NAME)
    key = next(key for key in state if key.endswith("lora_up.weight"))
    save_file({**state, key: state[key] * torch.nan}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / KOHYA_NAME).read_bytes()[:500])
    save_file(state, tmp_path / "meta.safetensors", metadata={"lora_adapter_metadata": "{"})
    for name, message in {"nan": "not finite", "cut": "no readable safetensors", "meta": "is not JSON"}.items():
        with pytest.raises(PipelineError, match=message):
            adapters.load_adapters(base, [(tmp_path / f"{name}.safetensors", 1.0)])


def test_dora_is_used_whole_or_not_at_all(tmp_path: Path) -> None:
    from peft import LoraConfig

    base, other = unet("sd15"), unet("sd15")
    other.add_adapter(LoraConfig(r=2, lora_alpha=1, use_dora=True, target_modules=["to_q", "conv1"]))
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "magnitude" in name:
                weight *= 1.5
            elif ".lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(other)),
        unet_lora_adapter_metadata={"r": 2, "lora_alpha": 1, "use_dora": True},
    )
    loaded = copy.deepcopy(base)
    adapters.load_adapters(loaded, [(tmp_path, 1.0)])
    assert close(output(loaded), output(other), output(base))
    assert close(output(adapters.merged_copy(loaded)), output(other), output(base))
    for refused in (
        lambda: adapters.set_adapter_scale(loaded, 0.5),
        lambda: adapters.save_adapter(loaded, tmp_path / "out", {}),
        lambda: adapters.load_adapters(base, [(tmp_path, 0.5)]),
        lambda: adapters.load_adapters(base, [(tmp_path, 1.0), (tmp_path, 1.0)]),
    ):
        with pytest.raises(PipelineError, match="DoRA"):
            refused()


def test_layers_whose_names_end_alike_are_told_apart() -> None:
    # FLUX.1 has `proj_out` both in its blocks and at its end; here with ranks of their own.
    network = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(6, 6)})
    network["blocks"] = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(6, 6), "other": torch.nn.Linear(6, 6)})
    random = torch.Generator().manual_seed(0)

    def layer(rank: int) -> LoraLayer:
        return LoraLayer(torch.randn(rank, 6, generator=random), torch.randn(6, rank, generator=random), float(rank))

    for layers in ({"proj_out": layer(2)}, {"proj_out": layer(2), "blocks.proj_out": layer(1)}):
        adapted = copy.deepcopy(network)
        adapters.attach(adapted, adapters._config(layers))
        found = adapters.adapter_layers(adapted)
        assert {name: one.rank for name, one in found.items()} == {name: one.rank for name, one in layers.items()}
