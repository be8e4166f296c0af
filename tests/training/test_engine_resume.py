"""Stopping and going on: killed, interrupted, out of disk, or asked to continue what is another run."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_tiny_sd
from tiny_runs import losses, run_config, write_pairs

from mmalign.config.run import RunConfig, dump_config
from mmalign.core.errors import UserError
from mmalign.methods import methods
from mmalign.training.checkpoint import (
    Checkpoint,
    DiskFull,
    check_same_recipe,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from mmalign.training.train import train
from pipelines import load_generator

FULL = {"adapter": {"kind": "full"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "sd": build_tiny_sd(folder / "sd"),
        "pairs": write_pairs(folder / "data"),
        "other": write_pairs(folder / "other", seed=1),
    }


def start(config: RunConfig, folder: Path, stop_at: int | None = None) -> subprocess.Popen[str]:
    """Run `mmalign train` in a process of its own; `stop_at`: it waits after that step, for a signal."""
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    wait = f"""
import time
from mmalign.training.loop import Loop
after_step = Loop._after_step
def pause(self, *arguments):
    after_step(self, *arguments)
    if self.step == {stop_at}:
        print("paused", flush=True)
        time.sleep(1)  # interrupted by the signal's handler, which then lets the loop go on
Loop._after_step = pause
"""
    code = (
        wait if stop_at else ""
    ) + f"import sys; from mmalign.cli import main; sys.exit(main(['train', {str(path)!r}]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def assert_same_run(one: Path, other: Path) -> None:
    """All that was logged and all that was saved at the end, bit by bit."""
    for key in ("loss", "grad_norm", "learning_rate", "policy_rejected", "reference_chosen"):
        assert losses(one, key) == losses(other, key), key
    ends = [load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (one, other)]
    assert ends[0].step == ends[1].step
    for group in ("weights", "ema", "optimizer"):
        assert all(torch.equal(value, ends[1].tensors[group][name]) for name, value in ends[0].tensors[group].items())


STEPS = {"steps": 7, "ema": 0.9, "schedule": "cosine", "precision": "bf16"}
RANDOM = {"caption_dropout": 0.3, "flip": True}


def test_killed_and_resumed_run_is_bit_equal(world: dict[str, Any], tmp_path: Path) -> None:
    whole = train(run_config(world["sd"], world["pairs"], tmp_path / "whole", data=RANDOM, **STEPS, **FULL))
    config = run_config(world["sd"], world["pairs"], tmp_path / "killed", data=RANDOM, **STEPS, **FULL)
    process = start(config, tmp_path, stop_at=5)
    assert process.stdout is not None and process.stdout.readline() == "paused\n"
    process.kill()
    process.communicate()
    killed = tmp_path / "killed"
    assert max(losses(killed)) == 5 and list_checkpoints(killed / "checkpoints")[-1].name == "step_00000004"
    train(config)
    # Were the reference taken from the resumed weights, the losses after the resume would start again at log 2.
    assert_same_run(whole, killed)
    exported = [load_generator(folder, device="cpu").network.state_dict() for folder in (whole, killed)]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def test_adapter_run_resumed_from_its_middle_is_bit_equal(world: dict[str, Any], tmp_path: Path) -> None:
    whole = train(run_config(world["sd"], world["pairs"], tmp_path / "whole", data=RANDOM, **STEPS))
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000007")
    train(run_config(world["sd"], world["pairs"], again, data=RANDOM, **STEPS))
    assert_same_run(whole, again)


def test_ctrl_c_saves_a_checkpoint_and_exits_130(world: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(world["sd"], world["pairs"], tmp_path / "out", steps=50, checkpoint_every=100)
    process = start(config, tmp_path, stop_at=3)
    assert process.stdout is not None and process.stdout.readline() == "paused\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130, stderr
    assert "stopping after this step" in stderr and "run the same command again" in stderr
    assert "Traceback" not in stderr
    saved = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert [path.name for path in saved] == ["step_00000004"]
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_another_recipe_or_other_data_is_refused_by_name(world: dict[str, Any], tmp_path: Path) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out"))
    before = (output / "metrics.jsonl").read_text()
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (world["other"], {}, "data.content"),
        (world["pairs"], {"seed": 1}, r"trainer.seed was 0, now 1"),
        (world["pairs"], {"learning_rate": 2e-3, "seed": 1}, r"learning_rate was 0.001, now 0.002; trainer.seed"),
        (world["pairs"], {"batch_size": 4}, r"samples per step was 2, now 4"),
        (world["pairs"], {"method": {"name": "diffusion_dpo", "beta": 1.0}}, r"method.beta was 2000.0, now 1.0"),
        (world["pairs"], {"adapter": {"kind": "lora", "rank": 2}}, r"adapter.rank was 4, now 2"),
    ]
    for pairs, changes, message in refused:
        with pytest.raises(UserError, match=message):
            train(run_config(world["sd"], pairs, output, **changes))
    assert (output / "metrics.jsonl").read_text() == before


def test_a_checkpoint_saved_under_the_old_name_of_a_key_is_the_same_recipe(tmp_path: Path) -> None:
    now = {"method.name": "vlm_dpo", "method.beta": 0.1, "method.dynamic_beta_scale": 0.5, "data.content": "ab"}
    saved = {"method.name": "vlm_dpo", "method.beta": 0.1, "method.margin_rise": 0.5, "data.content": "ab"}
    check_same_recipe(saved, now, tmp_path)
    with pytest.raises(UserError, match=r"method.dynamic_beta_scale was 0.25, now 0.5\."):
        check_same_recipe({**saved, "method.margin_rise": 0.25}, now, tmp_path)


def test_a_key_that_a_checkpoint_does_not_know_counts_as_its_default(tmp_path: Path) -> None:
    saved = {"method.name": "ddpo", "method.clip": 1e-4, "data.content": "ab"}
    now = {**saved, "method.mini_batches": 1, "trainer.ema": None, "data.flip": False}
    check_same_recipe(saved, now, tmp_path)
    with pytest.raises(UserError, match=r"method.mini_batches was 1, now 2\."):
        check_same_recipe(saved, {**now, "method.mini_batches": 2}, tmp_path)
    with pytest.raises(UserError, match=r"data.model was \(absent\), now x\."):
        check_same_recipe(saved, {**now, "data.model": "x"}, tmp_path)


def test_a_base_model_trained_anew_under_its_old_path_is_noticed(world: dict[str, Any], tmp_path: Path) -> None:
    model = shutil.copytree(world["sd"], tmp_path / "model")
    output = train(run_config(str(model), world["pairs"], tmp_path / "out"))
    changes = {"steps": 5}
    (model / "metrics.jsonl").write_text("{}")  # beside the model, no part of it
    assert train(run_config(str(model), world["pairs"], output, **changes)) == output
    build_tiny_sd(model, seed=1)
    with pytest.raises(UserError, match=r"model.content was [0-9a-f]{32}, now [0-9a-f]{32}"):
        train(run_config(str(model), world["pairs"], output, **changes))


def test_a_run_may_go_on_longer_and_be_watched_otherwise(world: dict[str, Any], tmp_path: Path) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out"))
    first = losses(output)
    moved = write_pairs(tmp_path / "moved")  # the same pairs at another place
    changes = {"steps": 6, "batch_size": 1, "gradient_accumulation": 2, "checkpoint_every": 3}
    train(run_config(world["sd"], moved, output, **changes))
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]
    assert {step: losses(output)[step] for step in first} == first
    with pytest.raises(UserError, match=r"trainer.warmup was 0.0, now 0.5"):
        train(run_config(world["sd"], moved, output, **{**changes, "warmup": 0.5}))
    whole = train(run_config(world["sd"], world["pairs"], tmp_path / "whole", steps=6))
    assert losses(output)[6] == pytest.approx(losses(whole)[6], rel=1e-3)


def test_a_finished_run_goes_on_with_more_steps_by_their_schedule(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"schedule": "cosine", "warmup": 0.5, "learning_rate": 1e-3}
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out", **changes))
    first = losses(output, "learning_rate")
    capsys.readouterr()
    train(run_config(world["sd"], world["pairs"], output, steps=8, **changes))
    # After 4 steps of 4 the rate is 0; of 8 with a warm-up of 4 it begins to fall from its peak.
    said = capsys.readouterr().err
    assert (
        "trainer.steps was 4, now 8: 4 are left, and the learning rate follows their schedule: from 0 to 0.001" in said
    )
    rates = losses(output, "learning_rate")
    assert {step: rates[step] for step in first} == first
    expected = {5 + step: 1e-3 * (0.5 + 0.5 * math.cos(math.pi * step / 4)) for step in range(4)}
    assert {step: rates[step] for step in range(5, 9)} == pytest.approx(expected)


def test_what_runs_did_before_a_key_existed_counts(tmp_path: Path) -> None:
    saved = {"method.name": "ddpo", "data.content": "ab"}
    with pytest.raises(UserError, match=r"method.advantage_epsilon was 1e-08, now 0.0001"):
        check_same_recipe(saved, {**saved, "method.advantage_epsilon": 1e-4}, tmp_path)
    check_same_recipe(saved, {**saved, "method.advantage_epsilon": 1e-8, "method.advantage_floor": 0.0}, tmp_path)
    tpo = {"method.name": "tpo", "method.beta": 200.0, "method.rejected_rise": None}  # that was no bound
    bound = methods.get("tpo").Config(beta=200.0).model_dump()["rejected_rise"]
    with pytest.raises(UserError, match=r"method.rejected_rise was None, now 0.03"):
        check_same_recipe(tpo, {**tpo, "method.rejected_rise": bound}, tmp_path)


def test_a_checkpoint_that_kept_its_warm_up_in_steps_still_resumes(tmp_path: Path) -> None:
    old = {"method.name": "sft", "trainer.warmup, in steps": 20}
    now = {"method.name": "sft", "trainer.warmup": 0.1, "trainer.steps": 200}
    check_same_recipe(old, now, tmp_path)
    with pytest.raises(UserError, match=r"trainer.warmup, in steps was 20, now 40"):
        check_same_recipe(old, {**now, "trainer.steps": 400}, tmp_path)


def test_resume_never_starts_again_and_keeps_the_earlier_run_aside(world: dict[str, Any], tmp_path: Path) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out"))
    earlier = losses(output)
    train(run_config(world["sd"], world["pairs"], output, seed=1), resume="never")
    assert losses(output)[4] != earlier[4]
    assert len(list_checkpoints(output / "checkpoints.previous")) == 2
    # From a named checkpoint, of this run or of another with the same recipe.
    train(
        run_config(world["sd"], world["pairs"], output), resume=str(output / "checkpoints.previous" / "step_00000002")
    )
    assert losses(output)[4] == earlier[4]
    with pytest.raises(UserError, match="no checkpoint"):
        train(run_config(world["sd"], world["pairs"], output), resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="beyond trainer.steps 3"):
        train(run_config(world["sd"], world["pairs"], output, steps=3))


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(
    world: dict[str, Any], tmp_path: Path
) -> None:
    output = train(run_config(world["sd"], world["pairs"], tmp_path / "out"))
    checkpoints = output / "checkpoints"
    shorter = run_config(world["sd"], world["pairs"], output, steps=3, keep_checkpoints=1)
    train(shorter, resume=str(checkpoints / "step_00000002"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000003", "step_00000004.abandoned"]
    assert load_checkpoint(checkpoints / "step_00000004.abandoned").step == 4


def test_full_disk_is_said_and_leaves_the_last_checkpoint(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(world["sd"], world["pairs"], tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    checkpoints = tmp_path / "out" / "checkpoints"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=10 if list_checkpoints(checkpoints) else usage.free)
    )
    with pytest.raises(DiskFull, match="the disk is full while saving .*keep_checkpoints"):
        train(config)
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    train(config)
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_write_that_fails_leaves_nothing_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import safetensors.torch

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(DiskFull):
        save_checkpoint(tmp_path, Checkpoint(1, {"weights": {"a": torch.zeros(2)}}, {}), keep=1)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_kept_in_number_and_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        tensors = {"weights": {"a": torch.full((2,), float(step))}, "optimizer": {}}
        save_checkpoint(tmp_path, Checkpoint(step, tensors, {"k": 1}, {"v": [1, 2]}), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    read = load_checkpoint(tmp_path / "step_00000010")
    assert read.step == 10 and read.recipe == {"k": 1} and read.values == {"v": [1, 2]}
    assert read.tensors["weights"]["a"].tolist() == [10.0, 10.0]
    # One that a crash left half written has another name and is not found.
    (tmp_path / "step_00000011.partial").mkdir()
    assert list_checkpoints(tmp_path)[-1].name == "step_00000010"


def test_damaged_checkpoint_is_said(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(1, {"weights": {"a": torch.zeros(2)}}, {}), keep=1)
    (path / "weights.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(path)
    document = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)


def test_finished_run_is_not_trained_again(world: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(world["sd"], world["pairs"], tmp_path / "out")
    output = train(config)
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert train(config) == output
    again = load_file(output / "pytorch_lora_weights.safetensors")
    assert weights.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in weights.items())
    assert sorted(losses(output)) == [1, 2, 3, 4]
