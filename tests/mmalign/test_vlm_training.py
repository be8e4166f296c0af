"""Vision-language models in the one engine: losses at the start, resuming, exports, looks, stages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, run_config, write_answer_pairs
from tiny_vlms import build_llava_onevision, build_qwen2_5_vl

from mmalign.checkpoint import list_checkpoints, load_checkpoint
from mmalign.cli import main
from mmalign.config import RunConfig, dump_config, load_config
from mmalign.engine import train
from mmalign.errors import UserError
from mmalign.hub import is_finished
from mmalign.shapes.video_set import write_video_set
from pipelines import load_vlm

LN2 = math.log(2)
LOOK = {"every": 2, "limit": 4, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    write_video_set(folder / "asked", 4, frames=(8,), size=32)
    return {
        "vlm": build_llava_onevision(folder / "vlm"),
        "pairs": write_answer_pairs(folder / "data", difficulty=[16, 16, 2, 2, 16, 2], own_media=True),
        "asked": str(folder / "asked"),
    }


def config(world: dict[str, Any], output: Path, method: Any = "vlm_dpo", **changes: Any) -> RunConfig:
    return run_config(world["vlm"], world["pairs"], output, method, **changes)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("vlm_dpo", LN2),
        ({"name": "vlm_dpo", "anchor_weight": 1.0}, 2 * LN2),
        ("rrpo", LN2),
        ({"name": "vdpo", "selection": "random", "operators": ["black"]}, LN2),
        ("rdpo", 2 * LN2),
        ({"name": "rdpo", "unseen": "column", "anchor_weight": 1.0}, 3 * LN2),
    ],
)
def test_the_loss_starts_at_multiples_of_ln_2_and_falls(
    world: dict[str, Any], tmp_path: Path, method: Any, expected: float
) -> None:
    output = train(config(world, tmp_path, method, steps=2, batch_size=6, learning_rate=1e-2))
    found = losses(output)
    assert found[1] == pytest.approx(expected, abs=1e-6)
    assert found[2] < expected - 1e-3
    # Forward and backward of two or three answers a pair, and of the reference forward.
    name = method if isinstance(method, str) else method["name"]
    assert losses(output, "images_seen")[2] == 2 * 6 * 3 * (3 if name == "rdpo" else 2)


def test_jsd_counts_what_it_looks_at(world: dict[str, Any], tmp_path: Path) -> None:
    options = {"name": "vdpo", "candidates": 2, "full_weight_at": 1e-6, "least_relevance": -1.0}
    output = train(config(world, tmp_path, options, steps=2))
    assert losses(output)[1] == pytest.approx(LN2, abs=1e-6)
    assert losses(output, "weight")[1] == 1.0
    # Six for the loss, and three looks (clean and two candidates) at each of two answers.
    assert losses(output, "images_seen")[2] == 2 * 2 * (6 + 3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_bit_and_the_export_loads_back(
    world: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    adapter = {"kind": "lora", "rank": 2} if kind == "lora" else {"kind": "full"}
    shared = {"adapter": adapter, "precision": "bf16", "checkpoint_every": 2, "ema": 0.5}
    whole = train(config(world, tmp_path / "whole", steps=4, **shared))
    train(config(world, tmp_path / "parts", steps=2, **shared))
    parts = train(config(world, tmp_path / "parts", steps=4, **shared))
    for key in ("loss", "grad_norm", "policy_chosen"):
        assert losses(whole, key) == losses(parts, key)
    ends = [load_checkpoint(list_checkpoints(one / "checkpoints")[-1]).tensors["weights"] for one in (whole, parts)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())

    assert is_finished(whole)
    model = load_vlm(whole, device="cpu")  # that it gives the trained model's logits, `train` has checked itself
    assert model.has_adapter == (kind == "lora")
    card = (whole / "README.md").read_text()
    assert 'library_name: "transformers"' in card and "AutoModelForImageTextToText" in card
    assert ("load_adapter" in card) == (kind == "lora")
    with pytest.raises(UserError, match="another adapter.kind"):
        other = {"kind": "full"} if kind == "lora" else {"kind": "lora"}
        train(config(world, tmp_path / "whole", adapter=other))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_precomputed_reference_gives_the_losses_of_a_live_one(
    world: dict[str, Any], tmp_path: Path, normalised: bool
) -> None:
    options = {"name": "vlm_dpo", "length_normalised": normalised, "beta": 0.5}
    found = [
        losses(train(config(world, tmp_path / kind, {**options, "reference": kind}, adapter={"kind": "full"})))
        for kind in ("live", "precomputed")
    ]
    assert found[1] == pytest.approx(found[0], abs=2e-6)
    stored = list((Path(world["pairs"]).parent / "cache" / "references").rglob("*.safetensors"))
    assert len(stored) == 1  # both the same content: computed once
    made = stored[0].stat().st_mtime_ns
    train(config(world, tmp_path / "again", {**options, "reference": "precomputed"}, steps=1))
    assert stored[0].stat().st_mtime_ns == made


def test_looks_ask_questions(world: dict[str, Any], tmp_path: Path) -> None:
    look = {**LOOK, "questions": world["asked"], "early_stop": {"reward": "accuracy", "patience": 1}}
    output = train(config(world, tmp_path, evaluate=look, steps=4))
    assert set(losses(output, "evaluation/accuracy")) == {0, 2}  # no better after one look: stopped
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    by_aspect = [key for key in line if key.startswith("evaluation/accuracy/")]
    assert by_aspect and line["evaluation/accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert losses(output, "images_seen")[2] == 2 * 2 * 6  # looks do not count
    assert not (output / "evaluation").exists()


def test_stages_start_where_the_stage_before_ended(world: dict[str, Any], tmp_path: Path) -> None:
    options = {"name": "temple", "stages": [16, 2], "beta": 0.5}
    output = train(config(world, tmp_path, options, steps=2, batch_size=3, learning_rate=1e-2))
    easy, merged = tmp_path / "stages" / "16" / "model", tmp_path / "stages" / "16" / "merged"
    for stage in (easy, output):
        assert losses(stage)[1] == pytest.approx(LN2, abs=1e-6)
        assert losses(stage)[2] < LN2
    # What the second stage starts from, and so its reference, is the first one's model.
    ends = [load_vlm(path, device="cpu") for path in (easy, merged)]
    sample = ends[0].encode(["?"], [[torch.rand(4, 3, 16, 16)]], ["yes"])
    with torch.no_grad():
        torch.testing.assert_close(ends[0].log_probs(sample)[0], ends[1].log_probs(sample)[0], atol=1e-5, rtol=0)
    before = (easy / "metrics.jsonl").read_text()
    shutil.rmtree(merged)
    train(config(world, tmp_path, options, steps=2, batch_size=3, learning_rate=1e-2))
    assert (easy / "metrics.jsonl").read_text() == before  # finished: not trained again
    with pytest.raises(UserError, match="no pair of difficulty 8"):
        train(config(world, tmp_path / "other", {"name": "temple", "stages": [16, 8]}))


def test_the_command_line_trains_a_vlm(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    given = config(world, tmp_path / "out", "rrpo", steps=1, evaluate={**LOOK, "questions": world["asked"]})
    path.write_text(dump_config(given))
    assert load_config(path) == load_config(path, [f"output={tmp_path / 'out'}"])
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "6 pairs of" in capsys.readouterr().out
    assert main(["train", str(path)]) == 0
    assert main(["list", "methods"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    papers = {"vlm_dpo": "2305.18290", "rrpo": "2504.12083", "vdpo": "2504.05810", "rdpo": "2502.13146"}
    for name, paper in {**papers, "temple": "2503.16929"}.items():
        assert "vlm" in rows[name] and paper in rows[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.resolution": 64}, "data.resolution: method 'vlm_dpo' trains a model that answers"),
        ({"attention": "xformers"}, "attention: method 'vlm_dpo' trains a model that answers; allowed: sdpa"),
        ({"evaluate": "{prompts: x, every: 2, rewards: [clip]}"}, "evaluate.questions: missing"),
        ({"evaluate": "{questions: x, every: 2, guidance: 3}"}, "evaluate.guidance: method 'vlm_dpo'"),
        ({"data.frames": 4, "data.fps": 2.0}, "frames and fps exclude each other"),
        ({"method": "sft", "data.frames": 4}, "data.frames: method 'sft' trains a model that draws"),
    ],
)
def test_keys_that_say_nothing_to_a_model_are_faults(
    world: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {world['vlm']}\nmethod: vlm_dpo\ndata: {{pairs: {world['pairs']}}}\noutput: out\n")
    with pytest.raises(UserError) as error:
        load_config(path, [f"{key}={value}" for key, value in changes.items()])
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["vlm_dpo", "rrpo", "vdpo", "rdpo", "temple"])
def test_the_configs_for_real_models_train_the_tiny_model_of_their_class(
    world: dict[str, Any], tmp_path: Path, name: str
) -> None:
    if not (tiny := Path(world["vlm"]).with_name("qwen")).exists():
        build_qwen2_5_vl(tiny)
    given = {"model": tiny, "data.pairs": world["pairs"], "data.cache": tmp_path, "output": tmp_path / "out"}
    given |= {"trainer.steps": 1, "trainer.gradient_accumulation": 2, "adapter.rank": 2}
    given |= {"method.stages": [16, 2]} if name == "temple" else {}
    recipe = load_config(f"qwen2_5_vl/{name}", [f"{key}={value}" for key, value in given.items()])
    assert recipe.trainer.precision == "bf16" and recipe.trainer.gradient_checkpointing
    output = train(recipe)
    factor = {"rdpo": 2.0, "vdpo": losses(output, "weight").get(1)}.get(name, 1.0)
    assert losses(output)[1] == pytest.approx(LN2 * factor, abs=1e-6)
    assert load_vlm(output, device="cpu").has_adapter
