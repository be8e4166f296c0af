"""Training with adapters that come from elsewhere or go elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_sd
from tiny_runs import losses, run_config, write_pairs

import mmalign
from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.training import loop
from mmalign.training.train import train
from pipelines import PipelineError, adapters, load_generator

TARGETS = ["to_q", "proj_in", "proj_out", "ff.net.2", "conv1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {"sd": build_tiny_sd(folder / "sd"), "pairs": write_pairs(folder / "data")}


@pytest.fixture(scope="module")
def kohya(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of kohya's trainer: attention at rank 3, convolutions at rank 2, alpha 1."""
    folder = tmp_path_factory.mktemp("kohya")
    random = torch.Generator().manual_seed(0)
    state = {}
    for rank, target in ((3, "to_v"), (2, "conv2")):
        for name, module in load_generator(world["sd"], device="cpu").network.named_modules():
            if name.endswith(target):
                key, weight = "lora_unet_" + name.replace(".", "_"), module.weight
                ones = (1,) * (weight.ndim - 2)
                state[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=random)
                state[f"{key}.lora_up.weight"] = 0.3 * torch.randn(weight.shape[0], rank, *ones, generator=random)
                state[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(state, folder / "style.safetensors")
    return folder / "style.safetensors"


def test_targets_of_every_kind_train_and_export(world: dict[str, Any], tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 2, "alpha": 1.0, "targets": TARGETS}
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "run", adapter=adapter, steps=2))
    assert load_generator(output, device="cpu").has_adapter
    kohya = load_file(output / "lora_kohya.safetensors")
    assert {key.split(".")[0].split("_")[-1] for key in kohya} == {"q", "in", "out", "2", "conv1"}
    assert not list(output.glob(".check-*"))


def test_an_export_that_cannot_be_read_ends_the_run_before_its_first_step(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        adapters, "write_lora", lambda folder, layers, network: save_file({}, folder / "x.safetensors")
    )
    monkeypatch.setattr(loop.Loop, "run", lambda *_: pytest.fail("a step was done"))
    with pytest.raises(PipelineError, match="holds no LoRA"):
        train(run_config(world["sd"], world["pairs"], tmp_path / "run"))


def test_training_starts_from_the_lora_of_another_tool(world: dict[str, Any], kohya: Path, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "start": str(kohya)}
    config = run_config(
        world["sd"], world["pairs"], tmp_path / "run", adapter=adapter, learning_rate=1e-4, precision="bf16"
    )
    output = train(config)
    # The reference is the start, so the first loss of DPO is log 2 and not that of a policy far from its reference.
    assert losses(output)[1] == pytest.approx(0.6931, abs=1e-3)
    before = load_generator(world["sd"], device="cpu", adapter=kohya).network
    after = load_generator(output, device="cpu").network
    start, found = adapters.adapter_layers(before), adapters.adapter_layers(after)
    assert found.keys() == start.keys() and {layer.rank for layer in found.values()} == {2, 3}
    moved = max(
        (found[name].up * found[name].scale - layer.up * layer.scale).abs().max() for name, layer in start.items()
    )
    assert 0 < moved < 0.01
    assert f"LoRA, from `{kohya}`" in (output / "README.md").read_text()
    with pytest.raises(UserError, match=f"set model: .*sd and adapter.start: {output}, or merge"):
        train(run_config(str(output), world["pairs"], tmp_path / "other"))


def test_a_start_gives_the_rank(kohya: Path, world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="start gives rank, alpha, targets and init; remove rank, or start"):
        run_config(world["sd"], world["pairs"], tmp_path, adapter={"start": str(kohya), "rank": 4})
    config = run_config(world["sd"], world["pairs"], tmp_path, adapter={"start": "no/lora.safetensors"})
    with pytest.raises(UserError, match="no/lora.safetensors: no such file"):
        train(config)


def test_several_adapters_draw_merge_and_count(
    world: dict[str, Any], kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_generator(world["sd"], device="cpu")
    base.add_adapter(2, alpha=1.0, seed=1)
    with torch.no_grad():
        for parameter in base.trainable_parameters():
            parameter.add_(0.1)
    base.save_lora(tmp_path / "ours")
    given = ["--adapter", f"{kohya}:0.5", "--adapter", str(tmp_path / "ours")]
    assert main(["merge", world["sd"], *given, "--out", str(tmp_path / "merged")]) == 0
    options: dict[str, Any] = {"steps": 2, "guidance": 1.0, "device": "cpu"}
    mixed = mmalign.generate(world["sd"], "a red circle", adapter=[(kohya, 0.5), str(tmp_path / "ours")], **options)
    also = mmalign.generate(str(tmp_path / "ours"), "a red circle", adapter=f"{kohya}:0.5", **options)
    file = mmalign.generate(
        tmp_path / "ours" / "lora_kohya.safetensors", "a red circle", adapter=(kohya, 0.5), **options
    )
    merged = mmalign.generate(tmp_path / "merged", "a red circle", **options)
    pictures = [torch.tensor(list(one[0].tobytes())).int() for one in (mixed, also, file, merged)]
    assert all((picture - pictures[0]).abs().max() <= 1 for picture in pictures)
    plain = mmalign.generate(world["sd"], "a red circle", **options)
    assert (torch.tensor(list(plain[0].tobytes())).int() - pictures[0]).abs().max() > 3
    draw = ["generate", world["sd"], "--prompts", "red circle", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*draw, *given]) == 0
    assert main([*draw, "--adapter", f"{kohya}:0.25", *given[2:]]) == 2
    assert "images made with other settings (fingerprint" in capsys.readouterr().err
    assert main([*draw, "--adapter", f"{kohya}:nan"]) == 2
    assert "must be a finite number" in capsys.readouterr().err
