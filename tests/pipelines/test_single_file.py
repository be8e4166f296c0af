"""Single-file checkpoints: a tiny SD1.5 written in the original layout, read without a network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from lora_tools import OUTSIDE, comfy_layers
from safetensors.torch import save_file
from torch import Tensor

from pipelines import PipelineError, fingerprint_model, load_generator, sample

NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}


def original_unet(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of a UNet under the names of the original code."""
    names = {own: name for name, own in comfy_layers(network.config).items()} | {"conv_norm_out": "out.0", **OUTSIDE}
    stems = {
        own.rsplit(".conv1", 1)[0]: name.rsplit(".in_layers", 1)[0] for own, name in names.items() if ".conv1" in own
    }
    stems |= {
        own.removesuffix(".proj_in"): name.removesuffix(".proj_in") for own, name in names.items() if "proj_in" in own
    }
    state = {}
    for key, value in network.state_dict().items():
        layer, end = key.rsplit(".", 1)
        if layer not in names:  # a norm, inside a resnet or a transformer
            stem = next(stem for stem in stems if layer.startswith(f"{stem}."))
            rest = layer.removeprefix(f"{stem}.")
            names[layer] = f"{stems[stem]}.{NORMS.get(rest, rest) if 'resnets' in stem else rest}"
        state[f"model.diffusion_model.{names[layer]}.{end}"] = value
    return state


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    rules = [
        (r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
        (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    state = {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        wide = ".attn_1." in name and name.endswith("weight") and "norm" not in name
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if wide else value
    return state


@pytest.fixture
def checkpoint(tiny_paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the tiny SD1.5, with its configuration in the folder beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_paths["sd15"])
    state = original_unet(pipe.unet) | original_vae(pipe.vae)
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "tiny.safetensors")
    source, config = Path(tiny_paths["sd15"]), tmp_path / "tiny"
    for file in [*source.rglob("*.json"), *source.rglob("*.txt")]:
        (config / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, config / file.relative_to(source))
    return tmp_path / "tiny.safetensors"


def test_a_checkpoint_is_the_model_that_it_was_made_of(checkpoint: Path, tiny_paths: dict[str, str]) -> None:
    ours, theirs = load_generator(checkpoint, device="cpu"), load_generator(tiny_paths["sd15"], device="cpu")
    images = [
        one.decode(sample(one, one.encode_prompts(["a red circle"]), steps=2, guidance=3.0, seeds=[1]).latents)
        for one in (ours, theirs)
    ]
    assert torch.equal(*images) and ours.name_or_path == str(checkpoint)
    made = [path.stat().st_mtime_ns for path in ours.root.rglob("*.safetensors")]
    assert fingerprint_model(checkpoint) == fingerprint_model(ours.root)
    assert made == [path.stat().st_mtime_ns for path in ours.root.rglob("*.safetensors")]
    ours.add_adapter(2)
    ours.save_lora(checkpoint.parent / "lora")
    assert load_generator(checkpoint.parent / "lora", device="cpu").has_adapter


def test_what_it_needs_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_cached(*_: object, **options: object) -> str:
        assert options["local_files_only"]
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing_cached)
    shutil.move(checkpoint.parent / "tiny", checkpoint.parent / "moved")
    with pytest.raises(
        PipelineError, match="configuration and tokenizer are not on this machine.*hf download"
    ) as found:
        load_generator(checkpoint)
    assert "\n" not in str(found.value) and "Stable Diffusion 1 checkpoint" in str(found.value)
    shutil.move(checkpoint.parent / "moved", checkpoint.parent / "tiny")
    config = checkpoint.parent / "tiny" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 24]}))
    with pytest.raises(PipelineError, match="does not fit the configuration") as found:
        load_generator(checkpoint)
    assert "\n" not in str(found.value) and not list((checkpoint.parent / "cache").rglob("model_index.json"))
    save_file({"a": torch.ones(1)}, checkpoint)
    with pytest.raises(PipelineError, match="no single-file checkpoint of Stable Diffusion 1, 2 or XL"):
        load_generator(checkpoint)
    with pytest.raises(PipelineError, match="is not safetensors"):
        load_generator(config)
