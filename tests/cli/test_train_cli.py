"""`mmalign train` as a user meets it: overrides, dry run, resume, and one clear line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import build_tiny_sd
from tiny_runs import losses, write_pairs

from mmalign.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {"sd": build_tiny_sd(folder / "sd"), "pairs": write_pairs(folder / "data")}


@pytest.fixture
def recipe(world: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    config = {
        "model": world["sd"],
        "method": {"name": "diffusion_dpo", "beta": 1000},
        "data": {"pairs": str(world["pairs"]), "cache": str(tmp_path / "cache")},
        "adapter": {"kind": "lora", "rank": 2},
        "trainer": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "log_every": 1},
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(config))
    return path


def test_trains_with_overrides_and_exports(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "method.beta=500", "trainer.steps=2"]) == 0
    printed = capsys.readouterr().err
    assert "beta=500, mean-reduced, half factor on" in printed
    assert "12 pairs kept of 12 read" in printed
    output = tmp_path / "out"
    assert sorted(losses(output)) == [1, 2]
    assert yaml.safe_load((output / "config.yaml").read_text())["method"]["beta"] == 500
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    # The same command again finds everything done; started afresh it trains again.
    assert main(["train", str(recipe), "method.beta=500", "trainer.steps=2"]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert main(["train", str(recipe), "method.beta=600", "trainer.steps=2", "--resume", "never"]) == 0


def test_a_shipped_config_says_how_its_data_are_made(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "shapes_vlm/vlm_dpo"]) == 2
    assert "configs/shapes_vlm/vlm_dpo.yaml describe how to make it" in capsys.readouterr().err
    assert main(["train", "shapes/diffusion_dpo", "data.pairs=mine.parquet"]) == 2
    assert "describe how" not in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("pairs:", "pairs: nowhere.parquet #"))
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "nowhere.parquet: no such file" in said and "describe how" not in said


def test_dry_run_prints_the_plan_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "trainer.steps=12", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for part in ("12 pairs", "12 of 2 samples (4 images) each", "2.00 passes", "trainable", str(tmp_path / "out")):
        assert part in plan, part
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trainer.batch_sise=4", ["trainer.batch_sise", "batch_size"]),
        ("trainer.steps=many", ["trainer.steps", "whole number"]),
        ("method.bta=3", ["method.bta", "did you mean 'beta'"]),
        ("method.name=difusion_dpo", ["did you mean 'diffusion_dpo'"]),
        ("method.timesteps=[0.9, 0.1]", ["timesteps", "low < high"]),
        ("method.timesteps=[0, 2000]", ["[0, 2000)", "1000"]),
        ("data.pairs=nowhere.parquet", ["nowhere.parquet"]),
        ("model=assets/nowhere/at/all", ["model assets/nowhere/at/all"]),
        ("trainer.precision=fp16", ["fp16 needs a GPU"]),
        ("trainer.batch_size=100", ["12 pairs", "100"]),
        ("rewards=[{name: clip}]", ["takes no rewards"]),
        ("output=LAZY", ["output", "lazy.txt: is a file"]),
        ("data.cache=LAZY/cache", ["data.cache", "lazy.txt on the way there is a file"]),
        ("data.prompts=prompts.txt", ["exclude each other"]),
        ("evaluate={prompts: gone.txt, every: 2, rewards: [shapes-quality]}", ["gone.txt"]),
        ("evaluate={prompts: LAZY, every: 2, rewards: [shapes-strict]}", ["cannot score 1 of 1 prompts", "'lazy'"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_mistake_is_one_line_with_exit_code_2(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: list[str], dry: bool
) -> None:
    (tmp_path / "lazy.txt").write_text("a lazy dog\n")
    change = change.replace("LAZY", str(tmp_path / "lazy.txt"))
    assert main(["train", str(recipe), change, *(["--dry-run"] if dry else [])]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_files_that_do_not_exist_are_counted_before_the_model_is_read(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool, kind: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    rows = [{"prompt": "p", "chosen": "a.png", "rejected": f"gone-{index % 3}.png"} for index in range(12)]
    path = tmp_path / "pairs.jsonl"
    if kind == "labels":
        rows = [{"prompt": "p", "image": row["rejected"], "label": 1, "id": str(i)} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.{kind}={path}", *(["data.pairs=null", "method=diffusion_kto"] if kind == "labels" else [])]
    assert main(["train", str(recipe), *words, *["--dry-run"] * dry]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    number = 4 if kind == "pairs" else 3
    assert f"3 of the {number} files that it names do not exist (first: {tmp_path / 'gone-0.png'})" in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_prompts_of_the_evaluation_that_are_missing_name_both_ways_on(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "evaluate={prompts: data/validation.txt, every: 2, rewards: [shapes-quality]}"
    assert main(["train", str(recipe), change, "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert "evaluate.prompts=FILE, or evaluate=null" in printed and "data/validation.txt" in printed
    assert main(["train", str(recipe), change, "evaluate=null", "--dry-run"]) == 2  # given twice
    assert main(["train", str(recipe), "evaluate=null", "--dry-run"]) == 0


def test_a_run_that_breaks_off_exits_with_1(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "method={name: 'tiny_runs:BreaksAtStepThree'}"]) == 1
    captured = capsys.readouterr().err
    assert "error: the loss became nan at step 3" in captured and "Traceback" not in captured


def test_resuming_another_recipe_exits_with_2_and_names_the_key(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe)]) == 0
    assert main(["train", str(recipe), "method.beta=1"]) == 2
    assert "method.beta was 1000.0, now 1.0" in capsys.readouterr().err


def test_metrics_are_json_lines(recipe: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe), "trainer.log_every=2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert all(line["images_per_second"] > 0 for line in lines)
