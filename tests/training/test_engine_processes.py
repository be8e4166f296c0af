"""Training in two real processes, as on a machine with two GPUs, gives what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, losses, online_config, run_config, write_answer_pairs, write_pairs
from tiny_vlms import build_llava_onevision

from mmalign.config.run import RunConfig, dump_config
from mmalign.training.train import train


def pairs_config(folder: Path, output: str, **changes: Any) -> RunConfig:
    data = folder / "data"
    pairs = data / "pairs.jsonl" if data.exists() else write_pairs(data)
    return run_config(str(folder / "sd"), pairs, folder / output, **changes)


def prompts_config(folder: Path, output: str, **changes: Any) -> RunConfig:
    """DDPO with advantages over all ranks, looks that may stop the run, and monitors that may too."""
    method = {"name": "ddpo", "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0, "updates_per_round": 2}
    looks = {"prompts": str(folder / output / "prompts.txt"), "every": 2, "rewards": [BRIGHTNESS], "steps": 2}
    stop = {"early_stop": {"reward": BRIGHTNESS, "patience": 9}}
    monitors = {"action": "stop"}
    return online_config(
        str(folder / "sd"), folder / output, method, evaluate={**looks, **stop}, monitors=monitors, **changes
    )


def groups_config(folder: Path, output: str, **changes: Any) -> RunConfig:
    """DGPO, whose noise levels all ranks share, with each reward normalised in its group over all ranks."""
    method = {"name": "dgpo", "sampling_steps": 3, "images_per_prompt": 2, "levels": 1, "sampler_steps": [0, 3]}
    method |= {"advantage_of": "each", "updates_per_round": 2, "old_decay": [0, 0.1, 0.3], "old_samples_after": 1}
    rewards = [{"name": BRIGHTNESS}, {"name": "tiny_rounds:Redness", "weight": 0.5}]
    return online_config(str(folder / "sd"), folder / output, method, rewards=rewards, **changes)


def grpo_config(folder: Path, output: str, **changes: Any) -> RunConfig:
    """Flow-GRPO, where groups of equal rewards leave the ranks with different numbers of samples."""
    method = {"name": "flow_grpo", "sampling_steps": 4, "images_per_prompt": 2, "mini_batches": 1, "clip": 1e-2}
    rewards = [{"name": "tiny_runs:BrightnessOfRed"}]
    return online_config(str(folder / "sd"), folder / output, method, rewards=rewards, **changes)


def answers_config(folder: Path, output: str, **changes: Any) -> RunConfig:
    """A vision-language model whose reference the first rank lets answer before."""
    data = folder / "data"
    pairs = data / "answers.jsonl" if data.exists() else write_answer_pairs(data)
    method = {"name": "vlm_dpo", "reference": "precomputed"}
    return run_config(str(folder / "vlm"), pairs, folder / output, method, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [pairs_config, prompts_config, groups_config, grpo_config, answers_config],
    ids=["diffusion_dpo", "ddpo", "dgpo", "flow_grpo", "vlm_dpo"],
)
def test_two_processes_train_as_one_with_accumulation(tmp_path: Path, make: Callable[..., RunConfig]) -> None:
    if make is answers_config:
        build_llava_onevision(tmp_path / "vlm")
    else:
        build_tiny_sd(tmp_path / "sd", "v_prediction" if make is groups_config else "epsilon", vae="tiny")
    config = make(tmp_path, "two")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, "mmalign", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(f"the model is in {tmp_path / 'two'}") == 1
    train(make(tmp_path, "one", gradient_accumulation=2))
    assert list(losses(tmp_path / "two")) == [1, 2, 3, 4]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    if make is not groups_config:  # there a rank without anything to learn from computes one sample for nothing
        assert losses(tmp_path / "two", "images_seen") == losses(tmp_path / "one", "images_seen")
    one, two = (load_file(next((tmp_path / folder).glob("*.safetensors"))) for folder in ("one", "two"))
    for key, tensor in one.items():
        assert (two[key] - tensor).abs().max() < 1e-6, key
