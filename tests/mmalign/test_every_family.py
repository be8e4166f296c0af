"""Every image method, from its config to its export, on every family of model, LoRA and full."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import build_tiny_sd, build_tiny_sdxl
from tiny_runs import BRIGHTNESS, losses, online_config, run_config, write_pairs

from mmalign.engine import train
from mmalign.hub import is_finished
from mmalign.latent_reward.config import LatentRewardConfig
from mmalign.latent_reward.training import make_parts
from mmalign.methods import methods
from pipelines import load_generator

FAMILIES, KINDS = ("sd15", "sd21-v", "sdxl"), ("lora", "full")
SAMPLER = {"sampling_steps": 2, "guidance": 2.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "align_prop": SAMPLER,
    "capo": {},
    "ddpo": {**SAMPLER, "images_per_prompt": 2, "advantage": "group"},
    "dense_dpo": {**SAMPLER, "images_per_prompt": 2, "updates_per_round": 2},
    "diffusion_dpo": {},
    "diffusion_dro": {"sampling_steps": 2, "updates_per_round": 2},
    "diffusion_kto": {},
    "inpo": {"inversion_steps": 2},
    "lpo": {**SAMPLER, "candidates": 2, "threshold": [0.0, 0.0]},
    "mapo": {},
    "prdp": {**SAMPLER, "images_per_prompt": 2, "updates_per_round": 1},
    "sft": {},
    "smpo": {"inversion_steps": 2},
    "spo": {**SAMPLER, "candidates": 2, "threshold": [0.0, 0.0]},
    "tpo": {},
}
NAMES = [name for name in methods.names() if methods.get(name).needs.modality == "image"]
GRID = list(product(NAMES, FAMILIES, KINDS))
# In the quick suite every method meets one family and one kind, and those take turns.
QUICK = [(name, FAMILIES[place % 3], KINDS[place % 2]) for place, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {
        "sd15": build_tiny_sd(folder / "sd15", vae="tiny"),
        "sd21-v": build_tiny_sd(folder / "sd21", "v_prediction", seed=1),
        "sdxl": build_tiny_sdxl(folder / "sdxl", seed=2),
    }


def write_scored_pairs(path: Path) -> Path:
    """Pairs with scores, in Pick-a-Pic's columns."""
    lines = write_pairs(path.parent / "images", 4).read_text().splitlines()
    rows = []
    for number, row in enumerate(map(json.loads, lines)):
        sides = (row["chosen"], row["rejected"])
        pictures = {f"jpg_{side}": (path.parent / "images" / name).read_bytes() for side, name in enumerate(sides)}
        scores = {"label_0": 1.0, "label_1": 0.0, "score_0": 0.9 - 0.1 * number, "score_1": 0.5}
        rows.append({"caption": row["prompt"], **scores, **pictures})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_captions(path: Path) -> Path:
    """The chosen images with a caption that does not fit."""
    rows = [json.loads(line) for line in write_pairs(path.parent / "images", 4).read_text().splitlines()]
    table = [
        {"image": f"images/{row['chosen']}", "caption": row["prompt"], "caption_rejected": "a star", "label": "good"}
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, table)))
    return path


def run_it(name: str, model: str, kind: str, folder: Path) -> Path:
    needs, options = methods.get(name).needs, dict(OPTIONS[name])
    adapter = {"kind": "lora", "rank": 4} if kind == "lora" else {"kind": "full"}
    if name == "lpo":
        config = LatentRewardConfig(model=model, data={"pairs": "none"}, output="none")
        make_parts(load_generator(model, device="cpu"), config).save(folder / "reward")
        options["latent_reward"] = str(folder / "reward")
    common: dict[str, Any] = {"steps": 2, "learning_rate": 1e-4, "adapter": adapter}
    if needs.source == "prompts":
        rewards = [] if needs.reward == "optional" else [{"name": BRIGHTNESS}]
        return train(online_config(model, folder / "out", {"name": name, **options}, **common, rewards=rewards))
    pairs = write_scored_pairs(folder / "pairs.parquet")
    data: dict[str, Any] = {"cache": str(folder / "cache")}
    if needs.source == "labels":
        data |= {"pairs": None, "labels": str(write_captions(folder / "captions.jsonl") if name == "tpo" else pairs)}
    return train(run_config(model, pairs, folder / "out", {"name": name, **options}, **common, data=data))


def check(name: str, family: str, kind: str, models: dict[str, str], folder: Path) -> None:
    output = run_it(name, models[family], kind, folder)
    assert is_finished(output) and set(losses(output)) == {1, 2}


def test_no_method_is_left_out() -> None:
    assert set(OPTIONS) == set(NAMES)
    assert {(family, kind) for _, family, kind in QUICK} == set(product(FAMILIES, KINDS))


@pytest.mark.parametrize(("name", "family", "kind"), QUICK)
def test_it_trains_a_family(name: str, family: str, kind: str, models: dict[str, str], tmp_path: Path) -> None:
    check(name, family, kind, models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "kind"), [case for case in GRID if case not in QUICK])
def test_it_trains_every_family(name: str, family: str, kind: str, models: dict[str, str], tmp_path: Path) -> None:
    check(name, family, kind, models, tmp_path)
