"""`mmalign train-reward` on tiny models and real files: what is drawn, learned, resumed, reported and refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd, build_tiny_sdxl
from tiny_runs import write_pairs

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.data.encoded.cache import CachedSides, encode_sides, pair_sides
from mmalign.data.pairs import read_pairs
from mmalign.training.latent_reward.accuracy import measure, table_of
from mmalign.training.latent_reward.comparisons import Comparisons, split
from mmalign.training.latent_reward.config import load_reward_config
from mmalign.training.latent_reward.training import level_grid
from pipelines import load_generator
from rewards import load_reward


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    build_tiny_sd(folder / "model", vae="tiny")
    pairs = write_pairs(folder / "pairs", 12)
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for index, line in enumerate(lines):  # prompts of one, two and three pairs
        line["prompt"] = ["a red circle", "a star", "two blue squares", "a green star", "three squares", "red"][
            index // 2
        ]
    pairs.write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def arguments(place: Path, output: Path, **changes: Any) -> list[str]:
    values = {
        "model": place / "model",
        "data.pairs": place / "pairs" / "pairs.jsonl",
        "data.cache": place / "cache",
        "trainer.steps": 8,
        "trainer.batch_size": 4,
        "trainer.learning_rate": 0.003,
        "trainer.precision": "fp32",
        "trainer.log_every": 1,
        "levels": 2,
        "held_out": 0.3,
        "output": output,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return ["train-reward", "shapes/latent_reward", *(f"{key}={value}" for key, value in values.items())]


def metrics(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "images_per_second", "memory_gb")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def test_learns_light_from_dark_and_says_how_well(place: Path, tmp_path: Path, capsys: Any) -> None:
    """Chosen images are light and rejected ones dark, which is soon seen where there is hardly any noise."""
    assert main(arguments(place, tmp_path / "out", trainer__steps=100, levels=1)) == 0
    output = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [level["level"] for level in found["levels"]] == [1] and found["accuracy"] == 1.0
    assert output[0].split() == ["level", "accuracy", "loss", "mean", "|gap|"] and output[1].split()[0] == "1"
    assert output[-1].split() == ["all", "1.000"]
    record = json.loads((tmp_path / "out" / "latent_reward.json").read_text())
    assert record["held_out_accuracy"] == 1.0 and record["model"] == str(place / "model")
    reward = load_reward("latent", weights=tmp_path / "out", device="cpu")
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    dark, light = reward(noise + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1), prompts=["a star"] * 2).tolist()
    assert light > dark


def test_a_stopped_run_goes_on_with_the_same_numbers(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert main(arguments(place, tmp_path / "whole")) == 0
    from mmalign.training.latent_reward import training

    update = training.RewardLearner.update

    def interrupted(self: Any, step: int) -> None:
        update(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.RewardLearner, "update", interrupted)
    assert main(arguments(place, tmp_path / "halves")) == 130
    assert len(metrics(tmp_path / "halves")) == 3 and not (tmp_path / "halves" / "latent_reward.json").exists()
    monkeypatch.undo()
    assert main(arguments(place, tmp_path / "halves")) == 0
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    accuracies = [json.loads((tmp_path / name / "accuracy.json").read_text()) for name in ("whole", "halves")]
    assert accuracies[0] == accuracies[1]


def test_a_checkpoint_without_costs_is_resumed(place: Path, tmp_path: Path) -> None:
    """As written before latent rewards and methods shared one loop."""
    again = arguments(place, tmp_path / "out", trainer__checkpoint_every=4, trainer__keep_checkpoints=2)
    assert main(again) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "out")]
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_00000008")
    state = tmp_path / "out" / "checkpoints" / "step_00000004" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "values": {}}))
    assert main(again) == 0
    assert [line["loss"] for line in metrics(tmp_path / "out")] == losses


def test_trackers_take_part_and_may_change(place: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = {"trainer__steps": 4, "trainer__checkpoint_every": 2, "trainer__keep_checkpoints": 2}
    assert main(arguments(place, tmp_path / "out", **kept)) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_00000004")
    tracked = {"trainer__trackers": "[tensorboard]", "trainer__tracker_project": "birds"}
    assert main(arguments(place, tmp_path / "out", **kept, **tracked)) == 0
    events = EventAccumulator(str(tmp_path / "out" / "birds")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 4]


def test_sdxl_trains_too(place: Path, tmp_path: Path) -> None:
    model = build_tiny_sdxl(tmp_path / "sdxl")
    assert main(arguments(place, tmp_path / "out", model=model, trainer__steps=2)) == 0
    assert len({line["loss"] for line in metrics(tmp_path / "out")}) == 2


def test_a_loss_that_is_no_number_stops_the_run(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(place, tmp_path / "out", trainer__learning_rate="1e30", trainer__warmup=0)) == 1
    error = capsys.readouterr().err
    assert (
        "the loss became nan at step 2; nothing was saved after it" in error and "Lower trainer.learning_rate" in error
    )
    assert not (tmp_path / "out" / "latent_reward.json").exists()


def test_split_is_by_prompt_and_weights_count_prompts_alike(place: Path) -> None:
    data = DataConfig(pairs=str(place / "pairs" / "pairs.jsonl"), cache=str(place / "cache"))
    table = read_pairs(str(data.pairs), data)
    generator = load_generator(place / "model", device="cpu")
    sides = CachedSides(**encode_sides(table, pair_sides, generator, data))
    learned, held_out = split(table, sides, 0.4, 0)
    prompts = [{table.prompts[table.prompt_index(row)] for row in part.rows} for part in (learned, held_out)]
    assert prompts[0] | prompts[1] == set(table.prompts) and not prompts[0] & prompts[1]
    assert sorted(learned.rows + held_out.rows) == list(range(12)) and prompts[0] and prompts[1]
    some = Comparisons(table, sides, [0, 1, 2])
    assert some.weights.tolist() == pytest.approx([0.75, 0.75, 1.5])
    batch = some.batch([2, 0], 0, 0)
    assert batch.prompts == ["a star", "a red circle"] and batch.weights.tolist() == pytest.approx([1.5, 0.75])
    assert batch.preference.tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match="held_out 1e-09 of 6 prompts"):
        split(table, sides, 1e-9, 0)

    def scores(batch: Any, t: Any, purpose: str) -> Any:
        # Right at level 1 for all, at 501 for the first of each batch of two, the others equal.
        return torch.tensor([2.0, 2.0 if t[0] == 1 else 0.0][: len(batch)]), torch.zeros(len(batch))

    near, far = measure(Comparisons(table, sides, range(4)), [1, 501], scores, 2, 0, "cpu")
    assert (near.accuracy, far.accuracy) == (1.0, 0.75) and near.gap == 2.0 and far.gap == 1.0
    assert near.loss == pytest.approx(0.126928, abs=1e-6)  # log(1 + e^-2)
    assert far.loss == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-6)
    assert far.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert table_of([near, far]).splitlines()[-1].split() == ["all", "0.875"]


def test_levels_are_evenly_spaced() -> None:
    assert level_grid(20, 1000) == list(range(1, 1000, 50)) and level_grid(20, 1000)[-1] == 951
    assert level_grid(3, 1000) == [1, 334, 667]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer.stepps": 3}, "did you mean 'steps'"),
        ({"data.prompts": "shapes-train"}, "a reward is trained on pairs"),
        ({"data.caption_dropout": 0.1}, "always needs the prompt"),
        ({"trainer.warmup": 9}, "9 steps of warm-up in a run of 8"),
        ({"held_out": 1.0}, "held_out"),
        ({"data.pairs": "nowhere.parquet"}, "nowhere.parquet"),
        ({"trainer.batch_size": 64}, "do not fill one step of 64"),
    ],
)
def test_wrong_input_is_one_line(place: Path, tmp_path: Path, capsys: Any, changes: Any, message: str) -> None:
    given = {key.replace(".", "__"): value for key, value in changes.items()}
    assert main(arguments(place, tmp_path / "out", **given)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("name", ["shapes/latent_reward", "sd15/latent_reward", "sdxl/latent_reward"])
def test_shipped_configs_are_read(name: str) -> None:
    config = load_reward_config(name)
    assert config.guidance == 7.5 and config.levels == 20
