"""A comparison that trains its systems: what it trains, finds, resumes and refuses, and how adapters are scaled."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, losses, write_pairs

from mmalign.cli import main
from mmalign.compare.config import CompareConfig, make_compare_config
from mmalign.compare.images.store import ImageStore, Sampling
from mmalign.compare.systems.facts import read_cost, read_system
from mmalign.compare.systems.training import plan_trainings, train_systems
from mmalign.config.run import load_config
from mmalign.core.errors import UserError
from mmalign.training import train as engine
from mmalign.training.tracking import read_metrics


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, pairs, prompts, a reward, and the training config "run.yaml" of four steps."""
    folder = tmp_path_factory.mktemp("shared")
    build_tiny_sd(folder / "base", vae="tiny")
    pairs = write_pairs(folder / "pairs", count=8)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    run = {
        "model": str(folder / "base"),
        "method": "sft",
        "data": {"pairs": str(pairs), "cache": str(folder / "cache")},
        "adapter": {"kind": "lora", "rank": 2},
        "trainer": {
            "steps": 4, "batch_size": 2, "learning_rate": 0.01, "warmup": 0, "log_every": 1, "checkpoint_every": 2
        },
        "output": "runs/sft",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def room(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of one test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def system(shared: Path, name: str, *overrides: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "train": str(shared / "run.yaml"), "overrides": list(overrides), **more}


def dpo(shared: Path, *overrides: str) -> dict[str, Any]:
    return system(shared, "dpo", "method=diffusion_dpo", "output=runs/dpo", "trainer.steps=2", *overrides)


def comparison(shared: Path, *systems: dict[str, Any], **changes: Any) -> CompareConfig:
    values = {
        "systems": [{"name": "base", "model": str(shared / "base")}, *systems],
        "prompts": str(shared / "prompts.txt"),
        "rewards": [BRIGHTNESS],
        "output": "out",
        "seeds": [0],
        "steps": 1,
        "guidance": 2.0,
        "resamples": 100,
    }
    return make_compare_config(**{**values, **changes})


def write(config: CompareConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def never(*arguments: Any, **options: Any) -> None:
    pytest.fail("trained what was there")


def test_two_systems_are_trained_compared_and_found_again(
    shared: Path, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(comparison(shared, system(shared, "sft"), dpo(shared)), room / "compare.yaml")
    assert main(["compare", file]) == 0
    said = capsys.readouterr().err
    assert f"── 1/2 sft ({shared / 'run.yaml'}): trains into runs/sft" in said
    assert f"── 2/2 dpo ({shared / 'run.yaml'}): trains into runs/dpo" in said
    results = json.loads((room / "out" / "results.json").read_text())
    models = {name: one["model"] for name, one in results["systems"].items()}
    assert models == {"base": str(shared / "base"), "sft": "runs/sft", "dpo": "runs/dpo"}
    assert len({one["fingerprint"] for one in results["systems"].values()}) == 3
    # The same training as that of `mmalign train` with these overrides.
    overrides = ["method=diffusion_dpo", "trainer.steps=2", "output=alone"]
    assert main(["train", str(shared / "run.yaml"), *overrides]) == 0
    assert losses(room / "alone") == losses(room / "runs" / "dpo") and len(losses(room / "alone")) == 2
    weights = "pytorch_lora_weights.safetensors"
    assert (room / "alone" / weights).read_bytes() == (room / "runs" / "dpo" / weights).read_bytes()

    monkeypatch.setattr(engine, "train", never)
    capsys.readouterr()
    assert main(["compare", str(room / "out" / "config.yaml"), "--no-train"]) == 0
    assert "2/2 dpo" in (said := capsys.readouterr().err) and said.count("trained already") == 2


def test_the_budget_is_an_override_of_every_trained_system(shared: Path, room: Path) -> None:
    for budget in ({"images": 640}, {"seconds": 1.5}, {"reward_calls": 32}):
        config = comparison(shared, system(shared, "sft"), dpo(shared), budget=budget)
        trainings = plan_trainings(config)
        given = [one.config.trainer.budget for one in trainings]
        assert [one.model_dump(exclude_none=True) for one in given if one] == [budget, budget]
        assert [one.config.trainer.steps for one in trainings] == [4, 2]
    assert [one.config.trainer.budget for one in plan_trainings(comparison(shared, dpo(shared)))] == [None]


def test_a_run_that_stayed_within_the_budget_is_found(shared: Path, room: Path) -> None:
    """SFT: 4 steps of 2 images, forward and backward each counting one, are 16 images seen."""
    train_systems(comparison(shared, system(shared, "sft")))
    assert losses(room / "runs" / "sft", "images_seen")[4] == 16
    for limit, state in ((16, "finished"), (15, "different")):
        (training,) = plan_trainings(comparison(shared, system(shared, "sft"), budget={"images": limit}))
        assert training.state == state


def test_an_unfinished_training_goes_on_to_the_same_weights(
    shared: Path, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = comparison(shared, system(shared, "sft"))
    train_systems(config)
    run = room / "runs" / "sft"
    weights, whole = (run / "pytorch_lora_weights.safetensors").read_bytes(), losses(run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")  # as if killed in its third step
    (run / "README.md").unlink()
    capsys.readouterr()
    assert train_systems(config) == {"base": str(shared / "base"), "sft": "runs/sft"}
    said = capsys.readouterr().err
    assert "resumes into runs/sft" in said and "resuming from runs/sft/checkpoints/step_00000002" in said
    assert (run / "pytorch_lora_weights.safetensors").read_bytes() == weights and losses(run) == whole


def test_weights_of_an_earlier_config_do_not_pass_for_those_of_the_run_that_goes_on(shared: Path, room: Path) -> None:
    train_systems(comparison(shared, system(shared, "sft", "trainer.steps=2")))
    # What a longer run leaves when it is stopped early: its own config beside the weights of the shorter one.
    path = room / "runs" / "sft" / "config.yaml"
    path.write_text(path.read_text().replace("steps: 2", "steps: 4"))
    (training,) = plan_trainings(comparison(shared, system(shared, "sft")))
    assert training.state == "unfinished"
    train_systems(comparison(shared, system(shared, "sft")))
    assert list(losses(room / "runs" / "sft")) == [1, 2, 3, 4]


def test_a_training_of_another_config_is_refused_or_set_aside(
    shared: Path, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_systems(comparison(shared, dpo(shared, "method.beta=9")))
    file = write(comparison(shared, dpo(shared, "trainer.seed=3", "method.beta=7")), room / "compare.yaml")
    before = (room / "runs" / "dpo" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    for flags in ([], ["--no-train"]):
        assert main(["compare", file, *flags]) == 2
        error = capsys.readouterr().err
        assert "system 'dpo': runs/dpo holds another training (method.beta was 9.0, now 7.0; " in error
        assert "trainer.seed was 0, now 3); add --retrain" in error and error.count("\n") == 1
    assert (room / "runs" / "dpo" / "metrics.jsonl").read_bytes() == before
    assert main(["compare", file, "--retrain"]) == 0
    assert (room / "runs" / "dpo.previous" / "metrics.jsonl").read_bytes() == before
    assert load_config(room / "runs" / "dpo" / "config.yaml").trainer.seed == 3
    # What is there and equal is no business of --retrain.
    assert [
        one.state for one in plan_trainings(comparison(shared, dpo(shared, "trainer.seed=3", "method.beta=7")))
    ] == ["finished"]


def test_faults_of_any_training_are_told_before_the_first_starts(
    shared: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "train", never)
    typos = [
        system(shared, "a", "trainer.stepz=1"),
        system(shared, "b", "method=stf"),
        {"name": "c", "train": "shapez/sft"},
    ]
    with pytest.raises(UserError) as caught:
        train_systems(comparison(shared, system(shared, "sft"), *typos))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["system 'a'", "system 'b'", "system 'c'"]
    for line, hint in zip(lines, ("'steps'", "'sft'", "'shapes/sft'"), strict=True):
        assert f"did you mean {hint}" in line
    late = system(shared, "late", "data.pairs=gone.parquet", "output=runs/late")
    with pytest.raises(UserError, match="system 'late': gone.parquet: no such file"):
        train_systems(comparison(shared, system(shared, "sft"), late))
    with pytest.raises(UserError, match="system 'sft': runs/sft holds no finished training; leave out --no-train"):
        train_systems(comparison(shared, system(shared, "sft")), train=False)
    with pytest.raises(UserError, match="system 'other': .*no such file"):
        train_systems(comparison(shared, system(shared, "sft"), {"name": "other", "model": str(room / "gone")}))
    assert not (room / "runs").exists()


def test_a_training_that_breaks_off_ends_the_comparison(
    shared: Path, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = system(shared, "broken", "method=tiny_runs:BreaksAtStepThree", "output=runs/broken")
    file = write(comparison(shared, system(shared, "sft", "trainer.steps=2"), broken), room / "compare.yaml")
    assert main(["compare", file]) == 1
    assert "error: the loss became nan at step 3" in capsys.readouterr().err
    assert not (room / "out").exists()
    plans = {one.systems[0]: one.state for one in plan_trainings(comparison(shared, broken))}
    assert plans == {"broken": "unfinished"}


def test_trainings_do_not_share_or_hold_each_others_folders(shared: Path, room: Path) -> None:
    clash = comparison(shared, system(shared, "sft"), system(shared, "more", "trainer.seed=1"))
    with pytest.raises(UserError, match="system 'more': trains into runs/sft as 'sft' does, by another config"):
        plan_trainings(clash)
    inner = comparison(shared, system(shared, "sft"), system(shared, "in", "output=runs/sft/in"))
    with pytest.raises(UserError, match="^system 'in': its output .*runs/sft/in lies in that of system 'sft'"):
        plan_trainings(inner)
    with pytest.raises(UserError, match="^the comparison: its output .* lies in that of system 'sft'"):
        plan_trainings(comparison(shared, system(shared, "sft"), output="runs/sft/compare"))


def test_what_was_trained_from_a_model_that_is_trained_anew_is_trained_anew(shared: Path, room: Path) -> None:
    first = system(shared, "first", "adapter={kind: full}", "output=runs/first")
    second = system(shared, "second", "model=runs/first", "output=runs/second")
    train_systems(comparison(shared, first, second))
    assert [one.state for one in plan_trainings(comparison(shared, first, second))] == ["finished", "finished"]
    first["overrides"].append("trainer.seed=1")
    states = {
        one.systems[0]: (one.state, one.differences) for one in plan_trainings(comparison(shared, first, second))
    }
    assert states["first"] == ("different", ["trainer.seed was 0, now 1"])
    assert states["second"] == ("different", ["model runs/first will be retrained"])


def test_adapter_scales_share_a_training_and_no_image(shared: Path, room: Path) -> None:
    scaled = [system(shared, f"sft-{scale}", adapter_scale=scale) for scale in (0.0, 0.5)]
    file = write(comparison(shared, system(shared, "sft"), *scaled), room / "compare.yaml")
    assert [one.systems for one in plan_trainings(comparison(shared, system(shared, "sft"), *scaled))] == [
        ["sft", "sft-0.0", "sft-0.5"]
    ]
    assert main(["compare", file]) == 0
    images = {folder.name: (folder / "0000-0.png").read_bytes() for folder in (room / "out" / "images").iterdir()}
    assert images["sft-0.0"] == images["base"] and len({*images.values()}) == 3
    results = json.loads((room / "out" / "results.json").read_text())["systems"]
    assert {name: one["adapter_scale"] for name, one in results.items()} == {
        "base": 1.0, "sft": 1.0, "sft-0.0": 0.0, "sft-0.5": 0.5
    }  # fmt: skip
    with pytest.raises(UserError, match="adapter_scale 0.5 needs an adapter, and .* trains with adapter.kind full"):
        plan_trainings(comparison(shared, system(shared, "x", "adapter={kind: full}", adapter_scale=0.5)))


def test_an_image_of_another_adapter_scale_is_not_used_again(tmp_path: Path) -> None:
    def missing(scale: float) -> bool:
        return bool(ImageStore(tmp_path, "print", Sampling(4, 2.0, adapter_scale=scale), ["a"], [0]).missing())

    store = ImageStore(tmp_path, "print", Sampling(4, 2.0, adapter_scale=0.5), ["a"], [0])
    store.put(0, 0, b"png")
    store.save()
    assert [missing(scale) for scale in (0.5, 0.25, 1.0)] == [False, True, True]
    assert json.loads((tmp_path / "manifest.json").read_text())["adapter_scale"] == 0.5


@pytest.mark.parametrize(
    ("systems", "changes", "message"),
    [
        ([{"name": "x"}], {}, "'x' has neither model nor train"),
        ([{"name": "x", "model": "m", "train": "t"}], {}, "'x' has both model and train"),
        ([{"name": "x", "model": "m", "overrides": ["a=1"]}], {}, "'x' has overrides but no train"),
        ([{"name": "x", "model": "m", "adapter_scale": -1.0}], {}, "greater than or equal to 0"),
        ([{"name": "x", "model": "m"}], {"budget": {"images": 5}}, "budget: no system is trained here"),
        ([{"name": "x", "train": "t"}], {"budget": {}}, "given no limit; give exactly one of images"),
        (
            [{"name": "x", "train": "t"}],
            {"budget": {"images": 5, "seconds": 1.0}},
            "given images, seconds; give exactly",
        ),
        (
            [{"name": "x", "train": "t", "overrides": ["trainer.budget.images=9"]}],
            {"budget": {"images": 5}},
            re.escape("'x' overrides trainer.budget.images=9, and budget applies to all; remove one"),
        ),
    ],
)
def test_systems_that_cannot_be(
    shared: Path, systems: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        comparison(shared, *systems, **changes)


def test_a_training_in_rounds_is_one_training(shared: Path, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both rounds count in its cost; it is found again, gone on with, and told apart by its whole recipe."""
    rounds = f"{{count: 2, prompts: {shared / 'prompts.txt'}, reward: '{BRIGHTNESS}', images_per_prompt: 2, steps: 1}}"
    own = dpo(shared, "data={}", "trainer.batch_size=1", "rounds=" + rounds)
    config = comparison(shared, own)
    assert [one.state for one in plan_trainings(config)] == ["absent"]
    assert train_systems(config)["dpo"] == "runs/dpo"
    assert [one.state for one in plan_trainings(config)] == ["finished"]
    facts = read_system("dpo", "runs/dpo", 2.0)
    parts = [read_cost(read_metrics(room / "runs/dpo" / part))["images_seen"] for part in ("rounds/1/model", "")]
    assert parts[0] > 0 and facts.cost["images_seen"] == sum(parts)
    assert [step for step, _ in facts.curves["loss"]] == [1, 2, 3, 4] and facts.trained_on == [BRIGHTNESS]
    longer = comparison(shared, {**own, "overrides": [*own["overrides"], "rounds.count=3"]})
    (training,) = plan_trainings(longer)
    assert (training.state, training.differences) == ("different", ["rounds.count was 2, now 3"])
    (room / "runs/dpo/rounds/config.yaml").unlink()  # as if it had been stopped before the end
    assert [one.state for one in plan_trainings(config)] == ["unfinished"]
    capsys.readouterr()
    train_systems(config)
    assert capsys.readouterr().err.count("trained already") == 2
    assert [one.state for one in plan_trainings(config)] == ["finished"]
