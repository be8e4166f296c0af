"""Whole runs on tiny real models: what is trained, exported, logged and refused."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd, build_tiny_sdxl
from tiny_runs import losses, run_config, write_pairs

from mmalign.config.run import load_config
from mmalign.core.errors import TrainingDiverged, UserError
from mmalign.core.resources import resolve_model
from mmalign.training import export, single
from mmalign.training.prepare import prepare
from mmalign.training.train import plan, train
from pipelines import load_generator, sample
from rewards import Reward, register

FULL = {"adapter": {"kind": "full"}}


@register
class Brightness(Reward):
    """Mean of the pixels."""

    name = "test-brightness"
    modality = "image"
    differentiable = True
    needs = frozenset()
    range = (0.0, 1.0)
    licence = "none"
    source = "none"
    citation = "none"

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "sd": build_tiny_sd(folder / "sd"),
        "sdxl": build_tiny_sdxl(folder / "sdxl"),
        "pairs": write_pairs(folder / "data"),
        "other": write_pairs(folder / "other", seed=1),
    }


def trained_weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = sorted((output / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / "weights.safetensors")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_recipe_trains_any_model_and_plain_diffusers_loads_the_result(
    world: dict[str, Any], tmp_path: Path, family: str, kind: str
) -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline

    config = run_config(world[family], world["pairs"], tmp_path / "out", **(FULL if kind == "full" else {}))
    output = train(config)
    assert losses(output)[1] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(output)[4] != losses(output)[1]

    ours = load_generator(output, device="cpu", resolve=resolve_model)
    base = load_generator(world[family], device="cpu")
    cond, seeds = ours.encode_prompts(["a red circle"]), [3]
    latents = sample(ours, cond, steps=4, guidance=3.0, seeds=seeds).latents
    untrained = sample(base, cond, steps=4, guidance=3.0, seeds=seeds).latents
    assert (latents - untrained).abs().max() > 1e-3

    pipe = DiffusionPipeline.from_pretrained(world[family] if kind == "lora" else output, safety_checker=None)
    if kind == "lora":
        pipe.load_lora_weights(str(output), weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seeds[0])
    theirs = pipe(
        "a red circle", num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    torch.testing.assert_close(ours.decode(latents), theirs.float(), rtol=0, atol=1e-4)


def test_what_lies_in_the_output(world: dict[str, Any], tmp_path: Path) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out"))
    names = {path.name for path in output.iterdir()}
    assert names == {
        "pytorch_lora_weights.safetensors",
        "lora_kohya.safetensors",
        "mmalign.json",
        "config.yaml",
        "README.md",
        "metrics.jsonl",
        "checkpoints",
    }
    assert json.loads((output / "mmalign.json").read_text())["base_model"] == world["sd"]
    resolved = load_config(output / "config.yaml")
    assert resolved.method["beta"] == 2000.0 and resolved.trainer.steps == 4
    card = (output / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    assert "library_name: diffusers" in front and "license: other" in front
    assert world["sd"] not in front and f"| base model | `{world['sd']}` |" in body  # a path is no id on the hub
    for part in ("`diffusion_dpo`", "beta=2000.0", "| seed | 0 |", "| pairs | 12 |", "load_lora_weights", "licence"):
        assert part in body, part
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "accuracy", "policy_chosen", "grad_norm", "learning_rate", "epoch", "memory_gb"} < set(line)


@pytest.mark.parametrize("changes", [{"batch_size": 2, "gradient_accumulation": 2}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_equivalent_runs_are_equal(world: dict[str, Any], tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    # beta small and steps short, so that float32 rounding is not amplified by the sigmoid; SGD-like comparison is not
    # possible with Adam, whose first step is +-lr whatever the gradient's size.
    method = {"name": "diffusion_dpo", "beta": 20.0, "sft_weight": 1.0}
    adapter = FULL if kind == "full" else {}
    common = {"steps": 3, "learning_rate": 1e-4, "method": method, **adapter}
    one = train(run_config(world["sd"], world["pairs"], tmp_path / "one", **{"batch_size": 4, **common}))
    other = train(run_config(world["sd"], world["pairs"], tmp_path / "two", **{"batch_size": 4, **changes, **common}))
    for step, loss in losses(one).items():
        assert losses(other)[step] == pytest.approx(loss, rel=1e-5)
        assert losses(other, "grad_norm")[step] == pytest.approx(losses(one, "grad_norm")[step], rel=1e-3)
    for name, weight in trained_weights(one).items():
        # Adam turns a gradient that is zero but for rounding into a whole step, hence the tolerance of a tenth of one.
        difference = (weight - trained_weights(other)[name]).abs()
        assert difference.mean() < 1e-6 and difference.max() < 1e-4, name


def test_bf16_trains_close_to_fp32_and_starts_exactly_at_the_reference(world: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("lora", "full"):
        adapter = FULL if kind == "full" else {}
        half = train(run_config(world["sd"], world["pairs"], tmp_path / f"{kind}-bf16", precision="bf16", **adapter))
        full = train(run_config(world["sd"], world["pairs"], tmp_path / f"{kind}-fp32", **adapter))
        assert losses(half, "logit")[1] == 0.0
        for name, value in losses(full, "policy_chosen").items():
            assert losses(half, "policy_chosen")[name] == pytest.approx(value, rel=0.02)
        assert all(weight.dtype == torch.float32 for weight in trained_weights(half).values())


def test_average_is_what_is_exported(world: dict[str, Any], tmp_path: Path) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out", ema=0.99, **FULL))
    from safetensors.torch import load_file

    shadow = load_file(output / "checkpoints" / "step_00000004" / "ema.safetensors")
    exported = load_generator(output, device="cpu").network.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in shadow.items())
    assert any(not torch.equal(exported[name], value) for name, value in trained_weights(output).items())


def test_evaluation_writes_images_and_rewards_from_step_zero(world: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\nthree green stars\n")
    look = {"prompts": str(prompts), "every": 2, "rewards": ["test-brightness"], "steps": 2, "guidance": 2.0}
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out", evaluate=look, trackers=["tensorboard"]))
    assert set(losses(output, "evaluation/test-brightness")) == {0, 2, 4}
    values = losses(output, "evaluation/test-brightness")
    assert 0 < values[0] < 1 and values[4] != values[0]
    sizes = [Image.open(output / "evaluation" / f"step_{step}.png").size for step in (0, 2, 4)]
    assert sizes[0] == sizes[1] == sizes[2] and sizes[0][0] > sizes[0][1]
    assert "test-brightness" in (output / "README.md").read_text()
    assert list(output.rglob("events.out.tfevents*"))

    base = load_generator(world["sd"], device="cpu")
    from mmalign.core.seeds import derive_seed

    seeds = [derive_seed(0, "evaluate", index) for index in range(3)]
    cond = base.encode_prompts(prompts.read_text().split("\n")[:3])
    images = base.decode(sample(base, cond, steps=2, guidance=2.0, seeds=seeds).latents)
    assert values[0] == pytest.approx(images.mean().item(), abs=1e-5)


def test_not_a_number_stops_the_run_and_saves_nothing_broken(world: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(world["sd"], world["pairs"], tmp_path / "out", "tiny_runs:BreaksAtStepThree", log_every=100)
    with pytest.raises(TrainingDiverged, match=r"loss became nan at step 3; .*step_00000002"):
        train(config)
    output = tmp_path / "out"
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (output / "pytorch_lora_weights.safetensors").exists()


def test_plan_counts_without_writing(world: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(
        world["sd"], world["pairs"], tmp_path / "out", steps=10, gradient_accumulation=2, batch_size=2, warmup=0.2
    )
    planned = plan(config)
    assert (planned.samples, planned.samples_per_step, planned.images_per_step) == (12, 4, 8)
    assert planned.epochs == pytest.approx(10 / 3) and planned.warmup == 2
    assert 0 < planned.trainable < planned.parameters
    assert "beta=2000" in str(planned)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"batch_size": 13}, "12 pairs and one step takes 13"),
        ({"trackers": ["trackio"]}, "pip install trackio"),
        ({"method": {"name": "sft", "timesteps": [0, 2000]}}, r"method.timesteps .*1000"),
        ({"adapter": {"kind": "lora", "targets": ["nothing"]}}, "no layer of the model matches"),
    ],
)
def test_what_cannot_work_is_refused(
    world: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    import importlib.util

    if changes.get("trackers") and importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed here")
    with pytest.raises((UserError, ValueError), match=message):
        train(run_config(world["sd"], world["pairs"], tmp_path / "out", **changes))


def test_an_adapter_is_no_base_and_an_output_keeps_its_kind(world: dict[str, Any], tmp_path: Path) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out", steps=1))
    with pytest.raises(UserError, match="is an adapter on"):
        train(run_config(str(output), world["pairs"], tmp_path / "second"))
    with pytest.raises(UserError, match="another adapter.kind"):
        train(run_config(world["sd"], world["pairs"], output, **FULL))


def test_the_trained_model_is_gone_before_the_exported_one_is_read(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, alive = [], []

    def remember(*arguments: Any) -> Any:
        parts = prepare(*arguments)
        networks.append(weakref.ref(parts.run.generator.network))
        return parts

    monkeypatch.setattr(single, "prepare", remember)
    monkeypatch.setattr(export, "check_load_back", lambda *_: alive.append(networks[0]()))
    train(run_config(world["sd"], world["pairs"], tmp_path / "out", steps=1, ema=0.9, **FULL))
    assert alive == [None]
