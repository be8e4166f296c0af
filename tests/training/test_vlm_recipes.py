"""Recipes for vision-language models: looks, stages, the command line, faults, and the configs for real models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, run_config, write_answer_pairs
from tiny_vlms import BUILDERS, build_llava_onevision, build_qwen2_5_vl

from mmalign.cli import main
from mmalign.compare.systems.config import check_values
from mmalign.compare.systems.facts import read_cost, read_system
from mmalign.compare.systems.training import plan_trainings
from mmalign.compare.vlm.config import QuestionConfig
from mmalign.config.run import RunConfig, dump_config, load_config
from mmalign.core.errors import UserError
from mmalign.core.resources import resolve_model
from mmalign.shapes.video_set import write_video_set
from mmalign.training.tracking import read_metrics
from mmalign.training.train import train
from pipelines import fingerprint_vlm, load_vlm

LN2 = math.log(2)
LOOK = {"every": 2, "limit": 4, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    write_video_set(folder / "asked", 4, frames=(8,), size=32)
    return {
        "vlm": build_llava_onevision(folder / "vlm"),
        "pairs": write_answer_pairs(folder / "data", difficulty=[16, 16, 2, 2, 16, 2]),
        "asked": str(folder / "asked"),
    }


def config(world: dict[str, Any], output: Path, method: Any = "vlm_dpo", **changes: Any) -> RunConfig:
    return run_config(world["vlm"], world["pairs"], output, method, **changes)


def test_looks_ask_questions(world: dict[str, Any], tmp_path: Path) -> None:
    look = {**LOOK, "questions": world["asked"], "early_stop": {"reward": "accuracy", "patience": 1}}
    output = train(config(world, tmp_path, evaluate=look, steps=4))
    assert set(losses(output, "evaluation/accuracy")) == {0, 2}  # no better after one look: stopped
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    by_aspect = [key for key in line if key.startswith("evaluation/accuracy/")]
    assert by_aspect and line["evaluation/accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert losses(output, "images_seen")[2] == 2 * 2 * 6  # looks do not count
    assert not (output / "evaluation").exists()


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_trains_in_bfloat16(family: str, tmp_path: Path) -> None:
    pairs = write_answer_pairs(tmp_path / "data")
    model = BUILDERS[family](tmp_path / "vlm")
    output = train(run_config(model, pairs, tmp_path / "out", "vlm_dpo", steps=2, precision="bf16"))
    assert losses(output)[1] == pytest.approx(LN2, abs=1e-6) and math.isfinite(losses(output)[2])


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
    # A comparison finds it finished, and counts the cost of all stages.
    recipe = tmp_path / "temple.yaml"
    recipe.write_text(dump_config(config(world, tmp_path, options, steps=2, batch_size=3, learning_rate=1e-2)))
    systems = [{"name": "base", "model": world["vlm"]}, {"name": "temple", "train": str(recipe)}]
    compared = {"systems": systems, "questions": world["asked"], "output": str(tmp_path.with_name("compared"))}
    assert [one.state for one in plan_trainings(check_values(QuestionConfig, compared))] == ["finished"]
    systems[1]["overrides"] = ["trainer.steps=3"]
    (other,) = plan_trainings(check_values(QuestionConfig, compared))
    assert (other.state, other.differences) == ("different", ["trainer.steps was 2, now 3"])
    costs = [read_cost(read_metrics(stage))["images_seen"] for stage in (easy, output)]
    facts = read_system("temple", str(output), 1.0, [], identify=fingerprint_vlm)
    assert facts.cost["images_seen"] == sum(costs) and min(costs) > 0
    assert [step for step, _ in facts.curves["loss"]] == [1, 2, 3, 4]
    shutil.move(tmp_path / "stages" / "config.yaml", tmp_path / "elsewhere")
    systems[1].pop("overrides")
    assert [one.state for one in plan_trainings(check_values(QuestionConfig, compared))] == ["unfinished"]
    with pytest.raises(UserError, match="no pair of difficulty 8"):
        train(config(world, tmp_path / "other", {"name": "temple", "stages": [16, 8]}))
    with pytest.raises(UserError, match="3 pairs of difficulty 16 and one step takes 4"):
        train(config(world, tmp_path / "other", options, batch_size=4))


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
        (
            {"data.resolution": 64},
            "data.resolution: not supported by vision-language methods such as 'vlm_dpo'; remove it",
        ),
        ({"flow": {"density": "mode"}}, "flow: not supported by vision-language methods such as 'vlm_dpo'; remove it"),
        ({"allow_distilled": True}, "allow_distilled: not supported by vision-language methods such as 'vlm_dpo'"),
        ({"attention": "xformers"}, "attention: method 'vlm_dpo' trains a vision-language model; allowed: sdpa"),
        ({"evaluate": "{prompts: x, every: 2, rewards: [clip]}"}, "evaluate.questions: missing"),
        (
            {"evaluate": "{questions: x, every: 2, guidance: 3}"},
            "evaluate.guidance: not supported by vision-language methods",
        ),
        ({"data.frames": 4, "data.fps": 2.0}, "frames and fps exclude each other"),
        ({"method": "sft", "data.frames": 4}, "data.frames: not supported by image methods such as 'sft'; remove it"),
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


METHODS = ["vlm_dpo", "rrpo", "vdpo", "rdpo", "temple", "vlm_sft"]


@pytest.mark.parametrize("name", METHODS)
def test_the_configs_for_shapes_train_the_shipped_model(tmp_path: Path, name: str) -> None:
    pairs = write_answer_pairs(tmp_path / "data", difficulty=[8, 4, 2, 8, 4, 2])
    given = {"data.pairs": pairs, "data.cache": tmp_path, "output": tmp_path / "out", "evaluate": "null"}
    given |= {"trainer.steps": 1, "trainer.batch_size": 2, "trainer.warmup": 0}
    output = train(load_config(f"shapes_vlm/{name}", [f"{key}={value}" for key, value in given.items()]))
    assert load_vlm(output, device="cpu", resolve=resolve_model).has_adapter


@pytest.mark.parametrize("name", METHODS)
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
    assert name == "vlm_sft" or losses(output)[1] == pytest.approx(LN2 * factor, abs=1e-6)
    assert load_vlm(output, device="cpu").has_adapter
