"""Every LoRA of a flow model that we write is found by ComfyUI's map of names, and goes to the right rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_flow_names import comfy_flow_map
from flow_tools import Models, load, moved
from original_names import original_sd3
from safetensors.torch import load_file

FILE = "pytorch_lora_weights.safetensors"
FAMILIES = ("sd3", "flux", "schnell", "z_image", "qwen_image", "flux2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("comfy"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_an_export_is_found(models: Models, name: str, tmp_path: Path) -> None:
    generator = load(models[name])
    found = comfy_flow_map(generator.network)
    generator.add_adapter(2, alpha=4.0)
    generator.save_lora(tmp_path)
    state = load_file(tmp_path / FILE)
    layers = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    assert {f"{layer}.lora_{end}.weight" for layer in layers for end in "AB"} == set(state)
    assert layers <= set(found)
    places = [found[layer] for layer in layers]
    assert len(set(places)) == len(places)  # no two of them in the same rows
    for layer in layers:
        rows = found[layer][2]
        assert rows is None or rows == len(state[f"{layer}.lora_B.weight"])
    assert not (tmp_path / "lora_kohya.safetensors").exists()


def test_rows_of_sd3_are_those_of_its_original_layout(models: Models, tmp_path: Path) -> None:
    """ComfyUI's sum, by hand on the original weights, is the merged model under the original names."""
    generator = load(models["sd3"])
    before = {name.removeprefix("model.diffusion_model."): v for name, v in original_sd3(generator.network).items()}
    generator.add_adapter(2, alpha=4.0, seed=1)
    moved(generator).save_lora(tmp_path)
    generator.save(tmp_path / "whole")
    after = original_sd3(load(str(tmp_path / "whole")).network)
    state, found, changed = load_file(tmp_path / FILE), comfy_flow_map(load(models["sd3"]).network), set()
    for key in (key for key in state if key.endswith(".lora_B.weight")):
        original, first, rows = found[key.removesuffix(".lora_B.weight")]
        change = state[key] @ state[key.replace("lora_B", "lora_A")]
        before[f"{original}.weight"][first : first + (rows or len(change))] += change
        changed.add(f"{original}.weight")
    for name, value in before.items():
        torch.testing.assert_close(value, after[f"model.diffusion_model.{name}"], rtol=1e-5, atol=1e-6)
    assert len(changed) == 2 * 4 - 1  # both fused and both output matrices of two blocks; the last has one output
