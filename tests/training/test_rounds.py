"""Iterated training: every round learns from what the round before drew, and a broken-off call goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, losses, run_config

from mmalign.config.run import RunConfig, load_config
from mmalign.config.sections import DataConfig
from mmalign.config.yaml import ConfigIssues
from mmalign.core.errors import UserError
from mmalign.core.io.parquet import read_metadata
from mmalign.data.labels import read_labels
from mmalign.shapes.scene_set import write_scenes
from mmalign.training.train import plan, train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("rounds") / "sd", vae="tiny")


def rounds_config(model: str, folder: Path, **changes: Any) -> RunConfig:
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    rounds = {
        "count": 2,
        "prompts": str(prompts),
        "reward": BRIGHTNESS,
        "images_per_prompt": 2,
        "steps": 2,
        "guidance": 1.0,
    }
    return run_config(model, prompts, folder / "out", steps=2, rounds=rounds, data={"pairs": None}, **changes)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_each_round_starts_from_the_one_before_and_its_pictures(model: str, tmp_path: Path, kind: str) -> None:
    adapter = {"kind": "lora", "rank": 4} if kind == "lora" else {"kind": "full"}
    config = rounds_config(model, tmp_path, adapter=adapter)
    output = train(config)
    first, second = output / "rounds" / "1", output / "rounds" / "2"
    start = first / ("merged" if kind == "lora" else "model")
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert (written["model"], written["data"]["pairs"]) == (str(start), str(second / "pairs.parquet"))
    sampling = [read_metadata(folder / "pairs.parquet")["sampling"] for folder in (first, second)]
    assert [one["model"] for one in sampling] == [model, str(start)]
    assert sampling[0]["fingerprint"] != sampling[1]["fingerprint"] and sampling[0]["seed"] != sampling[1]["seed"]

    # Broken off after the first round, and called again: the first is left alone, the second comes out the same.
    expected, before = losses(output), (first / "model" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(second)
    for path in output.iterdir():
        if path.name != "rounds":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(config)
    assert losses(output) == expected and set(expected) == {1, 2}
    assert (first / "model" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_share_of_real_images_is_mixed_into_every_round(model: str, tmp_path: Path) -> None:
    write_scenes(tmp_path / "real.parquet", 3, seed=1)
    config = rounds_config(model, tmp_path)
    assert config.rounds is not None
    rounds = config.rounds.model_copy(update={"real": str(tmp_path / "real.parquet"), "real_share": 0.75})
    output = train(config.model_copy(update={"rounds": rounds, "method": {"name": "sft"}}))
    for number in ("1", "2"):
        mixed = output / "rounds" / number / "mixed.parquet"
        table = read_labels(str(mixed), DataConfig())
        # Two chosen images, so six real ones: each of the three twice.
        assert [name.partition("/")[0] for name in table.ids] == ["own"] * 2 + ["real"] * 6
        real = read_labels(str(tmp_path / "real.parquet"), DataConfig())
        assert sorted(record.prompt for record in list(table)[2:]) == sorted(2 * [one.prompt for one in real])
        assert {record.image for record in list(table)[2:]} == {record.image for record in real}
        assert read_metadata(mixed)["rewards"][0]["name"] == BRIGHTNESS
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["data"]["labels"] == str(mixed) and written["data"]["pairs"] is None


def test_rounds_refuse_what_they_cannot_do(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rounds_config(model, tmp_path)
    with pytest.raises(UserError, match="allowed: auto, never"):
        train(config, resume=str(tmp_path))
    with pytest.raises(UserError, match="sample their data during training"):
        plan(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        train(config)


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("sft", "{pairs: some.parquet}", r"data.pairs: rounds sample the training data themselves; set it to null"),
        ("ddpo", "{}", r"rounds: method 'ddpo' draws its own samples"),
        ("diffusion_dpo", "{}", r"rounds.real: real samples of method 'diffusion_dpo' .* give method.sft_weight"),
        ("inpo", "{}", r"rounds.real: method 'inpo' learns from pairs, not from good images"),
    ],
)
def test_config_with_rounds_names_no_data(tmp_path: Path, method: str, data: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    rewards = "rewards: [shapes-correctness]\n" if method == "ddpo" else ""
    real = ", real: some.parquet" if method in ("diffusion_dpo", "inpo") else ""
    rounds = f"rounds: {{count: 2, prompts: shapes-train, reward: shapes-correctness{real}}}\n"
    path.write_text(f"model: m\nmethod: {method}\ndata: {data}\noutput: o\n{rewards}{rounds}")
    with pytest.raises(ConfigIssues, match=message):
        load_config(path)
