"""What trackers are told: one run that goes on after a break, the config, and names that are checked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image

from mmalign.config.run import RunConfig, dump_config, load_config
from mmalign.core.errors import UserError
from mmalign.training.accelerator import make_accelerator
from mmalign.training.recipe import recipe
from mmalign.training.tracking import Metrics, read_metrics


def config_of(output: Path, *trackers: str, **trainer: Any) -> RunConfig:
    values = {"model": "m", "method": {"name": "sft"}, "data": {"pairs": "p"}, "output": str(output)}
    return RunConfig(**values, trainer={"trackers": list(trackers), **trainer})


def log(config: RunConfig, start: int, steps: dict[int, float], picture: bool = False) -> None:
    """Open the metrics as a run does that goes on after step `start`, log a loss for each step, and end."""
    accelerator = make_accelerator(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(output, config, accelerator, start)
    for step, loss in steps.items():
        metrics.log(step, {"loss": loss, "nothing": float("nan")})
    if picture:
        metrics.log_image(max(steps), "evaluation", Image.new("RGB", (4, 6), "red"))
    accelerator.end_training()


def test_tensorboard_holds_each_step_of_a_resumed_run_once_and_the_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path / "out", "tensorboard", tracker_project="birds")
    log(config, 0, {1: 0.5, 2: 0.25, 3: 9.0, 4: 9.0})  # broke off after step 4, its last checkpoint was of step 2
    log(config, 2, {3: 0.125, 4: 0.0625}, picture=True)
    events = EventAccumulator(str(tmp_path / "out" / "birds")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
        (4, 0.0625),
    ]
    assert "nothing" not in events.Tags()["scalars"]
    (image,) = events.Images("evaluation")
    assert (image.width, image.height, image.step) == (4, 6, 4)
    told = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert [line.removeprefix("    ") for line in told.splitlines()] == dump_config(config).splitlines()
    assert [line["loss"] for line in read_metrics(tmp_path / "out")] == [0.5, 0.25, 0.125, 0.0625]


def test_tensorboard_forgets_a_run_that_is_started_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, "tensorboard")
    log(config, 0, {1: 0.5, 2: 0.25})
    log(config, 0, {1: 0.75})
    events = EventAccumulator(str(tmp_path / "mmalign")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.75)]


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False
    told: list[tuple[Any, ...]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.told.append(("start", self.project, self.options))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.told.append(("log", step, values))

    def finish(self) -> None:
        self.told.append(("finish",))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(Recorder, "told", [])
    return Recorder.told


def test_a_tracker_that_accelerate_was_told_of_takes_part(recorded, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    log(config_of(tmp_path, "recorder", tracker_project="p"), 0, {1: 0.5})
    assert [entry[0] for entry in recorded] == ["start", "config", "log", "finish"]
    assert recorded[0] == ("start", "p", {})
    assert recorded[1][1]["trainer.betas"] == "[0.9, 0.999]" and recorded[1][1]["trainer.learning_rate"] == 1e-4
    assert recorded[2] == ("log", 1, {"loss": 0.5})


@pytest.mark.parametrize(("tracker", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_goes_on_keeps_its_identity_and_a_new_one_gets_its_own(
    recorded, monkeypatch, tmp_path: Path, tracker: str, key: str
) -> None:
    named = type("Named", (Recorder,), {"name": tracker})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, tracker, named)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(tracker)])
    config = config_of(tmp_path / "dpo", tracker, tracker_run="try 7")
    for start in (0, 3, 0):
        log(config, start, {})
    first, same, new = (entry[2] for entry in recorded if entry[0] == "start")
    assert first[key] == same[key] != new[key]
    assert all(options["resume"] == "allow" for options in (first, same, new))
    assert first["name"].startswith("try 7") and first["config"]["trainer"]["tracker_run"] == "try 7"
    assert json.loads((tmp_path / "dpo" / "tracking.json").read_text())[tracker] == new[key]


def test_unknown_and_missing_trackers_are_named_with_the_fix(monkeypatch, tmp_path: Path) -> None:
    base = {"model": "m", "method": "sft", "data": {"pairs": "p"}, "output": str(tmp_path)}
    with pytest.raises(UserError, match=r"trainer.trackers: .*'tensorbord'.*trackio.*did you mean 'tensorboard'"):
        load_config(base, ["trainer.trackers=[tensorbord]"])
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UserError, match="asks for mlflow, which is not installed: pip install mlflow"):
        make_accelerator(load_config(base, ["trainer.trackers=[mlflow]"]))


def test_trackers_are_no_part_of_what_must_be_equal_to_go_on(tmp_path: Path) -> None:
    plain, watched = config_of(tmp_path), config_of(tmp_path, "tensorboard", tracker_project="p", tracker_run="r")
    assert recipe(plain, "d", "m", 1) == recipe(watched, "d", "m", 1)
    assert "tracker_" not in dump_config(plain) and "tracker_run: r" in dump_config(watched)
    assert load_config(watched.model_dump(mode="json")).trainer == watched.trainer


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_goes_on_under_one_id(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(tmp_path / "out", "wandb")
    log(config, 0, {1: 0.5})
    log(config, 1, {2: 0.25})
    folders = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    key = json.loads((tmp_path / "out" / "tracking.json").read_text())["wandb"]
    assert len(folders) == 2 and all(folder.name.endswith(key) for folder in folders)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_goes_on_in_one_run(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage  # reads the variable when it is first imported

    config = config_of(tmp_path / "out", "trackio", tracker_project="birds")
    log(config, 0, {1: 0.5})
    log(config, 1, {2: 0.25})
    (name,) = SQLiteStorage.get_runs("birds")
    assert name.startswith("out-")
    assert [line["loss"] for line in SQLiteStorage.get_logs("birds", name) if "loss" in line] == [0.5, 0.25]
