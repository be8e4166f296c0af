"""What is read from model directories: the rewards of the training, its configuration and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from mmalign.compare.systems.facts import find_trained_on, read_curves, read_system
from mmalign.core.errors import UserError
from mmalign.core.io.parquet import atomic_parquet
from mmalign.training.tracking import read_metrics


def fake_model(folder: Path, **config: Any) -> Path:
    (folder / "unet").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def fake_pairs(path: Path, metadata: dict[str, Any]) -> Path:
    with atomic_parquet(path, pa.schema([("caption", pa.string())]), metadata) as rows:
        rows.add({"caption": "x"})
    return path


def test_trained_on_comes_from_config_pairs_and_ancestors(tmp_path: Path) -> None:
    pairs = fake_pairs(tmp_path / "pairs.parquet", {"rewards": [{"name": "oracle", "weight": 1.0}]})
    grand = fake_model(tmp_path / "grand", model="no/where-else", rewards=[{"name": "clip", "weight": 1.0}])
    parent = fake_model(tmp_path / "parent", model=str(grand), data={"pairs": str(pairs)}, rewards=[])
    child = fake_model(tmp_path / "child", model=str(parent), data={"pairs": None, "prompts": "p"})
    assert find_trained_on(str(child)) == (["oracle", "clip"], "")
    assert find_trained_on(str(fake_model(tmp_path / "plain"))) == ([], "")


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    silent = fake_pairs(tmp_path / "human.parquet", {})
    model = fake_model(tmp_path / "a", model="org/base", data={"pairs": str(silent)})
    assert "name no reward" in find_trained_on(str(model))[1]
    model = fake_model(tmp_path / "b", model="org/base", data={"pairs": str(tmp_path / "gone.parquet")})
    names, remark = find_trained_on(str(model))
    assert names == [] and "gone.parquet do not exist" in remark
    facts = read_system("b", str(model), 4.0, trained_on=["oracle"])
    assert (facts.trained_on, facts.remark) == (["oracle"], "")


def test_curves_and_configuration(tmp_path: Path) -> None:
    model = fake_model(tmp_path / "m", model="org/base", method={"name": "sft"}, rewards=[{"name": "clip"}])
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": null, "accuracy": 1}', '{"step": 3, "lo']
    (model / "metrics.jsonl").write_text("\n".join(lines))
    assert read_curves(read_metrics(model)) == {"loss": [(1, 0.5)], "accuracy": [(2, 1.0)]}
    assert read_system("m", str(model), 4.0).run_config == {
        "model": "org/base",
        "method.name": "sft",
        "rewards.0.name": "clip",
    }


def test_evaluations_and_cost_are_read_where_they_were_counted(tmp_path: Path) -> None:
    model = fake_model(tmp_path / "m", model="org/base")
    lines = [
        {"step": 0, "images_seen": 0, "images_sampled": 0, "reward_calls": 0, "seconds": 0.0, "evaluation/clip": 0.1},
        {"step": 2, "images_seen": 64, "images_sampled": 8, "reward_calls": 8, "seconds": 1.5, "loss": 0.7},
        {
            "step": 2,
            "images_seen": 64,
            "images_sampled": 8,
            "reward_calls": 8,
            "seconds": 1.5,
            "evaluation/clip": None,
        },
        {"step": 4, "images_seen": 128, "images_sampled": 16, "reward_calls": 16, "seconds": 3.5, "loss": 0.6},
    ]
    (model / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    facts = read_system("m", str(model), 4.0)
    assert facts.cost == {"images_seen": 128, "images_sampled": 16, "reward_calls": 16, "seconds": 3.5}
    counted = {"images_seen": 0, "images_sampled": 0, "reward_calls": 0, "seconds": 0}
    assert facts.evaluations == [
        {**counted, "evaluation/clip": 0.1},
        {"images_seen": 64, "images_sampled": 8, "reward_calls": 8, "seconds": 1.5},
    ]
    (model / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0}\n{"step": 1, "evaluation/clip": 0.2}')
    facts = read_system("m", str(model), 4.0)
    assert (facts.evaluations, facts.cost) == ([], {})
    with pytest.raises(UserError, match="system 'm': adapter_scale 0.5 needs an adapter, .* adapter.kind lora"):
        read_system("m", str(model), 4.0, adapter_scale=0.5)
