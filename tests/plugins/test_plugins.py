"""Plug-ins as the documentation of 0.1.0 taught them: they train, and the names they import are where they were."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
from tiny_models import build_tiny_sd
from tiny_runs import losses, online_config, run_config, write_pairs

from mmalign.training.train import train

PUBLIC = {
    "mmalign.config": ["RunConfig", "DataConfig", "TrainerConfig", "load_config", "dump_config", "load_schema"],
    "mmalign.methods": ["methods"],
    "mmalign.methods.base": [
        "LossOutput",
        "Method",
        "MethodConfig",
        "Needs",
        "TimestepRange",
        "PairBatch",
        "LabelBatch",
    ],
    "mmalign.methods.trajectory": ["TrajectoryConfig", "TrajectoryMethod", "Rollout"],
    "mmalign.run": ["Run"],
    "mmalign.batches": ["PairBatch", "LabelBatch", "PromptBatch", "ComparisonBatch", "VlmPairBatch", "TimedMedia"],
    "mmalign.losses": ["denoising_error", "diffusion_dpo", "dpo", "spo", "gaussian_kl"],
    "mmalign.cli": ["main"],
    "pipelines": ["Conditioning", "Generator", "load_generator", "load_vlm", "sample", "invert", "NoiseProcess"],
    "pipelines.conditioning": ["Conditioning"],
    "pipelines.generator": ["Generator"],
    "rewards": ["Reward", "load_reward", "list_rewards", "register", "Facts", "TwoTowerReward", "RewardError"],
    "rewards.base": ["Reward"],
    "rewards.encoders": ["Encoder", "EncoderReward", "load_encoder", "load_preset"],
    "rewards.errors": ["RewardError"],
}
"""What plug-ins were told to import, by module."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("plugins") / "sd", vae="tiny")


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


def test_modules_that_moved_are_found_under_their_old_names() -> None:
    from mmalign.core.moved import MOVED
    from rewards.moved import MOVED as MOVED_REWARDS

    for old, new in {**MOVED, **MOVED_REWARDS}.items():
        module = importlib.import_module(old)
        assert module is importlib.import_module(new), old
        assert module.__spec__ is not None and module.__spec__.name == module.__name__ == new
    with pytest.raises(ModuleNotFoundError, match="mmalign.nothing"):
        importlib.import_module("mmalign.nothing")


def test_a_method_on_pairs_trains(model: str, tmp_path: Path) -> None:
    method = {"name": "margin:Margin", "margin": 0.02}
    output = train(run_config(model, write_pairs(tmp_path / "pairs"), tmp_path / "out", method, steps=2))
    assert list(losses(output, "gap")) == [1, 2] and all(math.isfinite(loss) for loss in losses(output).values())


def test_a_method_on_its_own_samples_trains(model: str, tmp_path: Path) -> None:
    method = {"name": "reinforce:Reinforce", "sampling_steps": 2, "guidance": 1.0, "updates_per_round": 2}
    output = train(online_config(model, tmp_path / "out", method, steps=2))
    assert losses(output, "log_ratio_max")[1] == 0 and losses(output, "log_ratio_max")[2] > 0
