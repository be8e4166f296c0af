"""Training in two real processes, as on a machine with two GPUs, gives what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import build_tiny_sd
from tiny_runs import losses, run_config, write_pairs

from mmalign.config import dump_config
from mmalign.engine import train


@pytest.mark.slow
def test_two_processes_train_as_one_with_accumulation(tmp_path: Path) -> None:
    model, pairs = build_tiny_sd(tmp_path / "sd"), write_pairs(tmp_path / "data")
    config = run_config(model, pairs, tmp_path / "two")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, "mmalign", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(f"the model is in {tmp_path / 'two'}") == 1
    train(run_config(model, pairs, tmp_path / "one", gradient_accumulation=2))
    assert list(losses(tmp_path / "two")) == [1, 2, 3, 4]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    name = "pytorch_lora_weights.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
    for key, tensor in one.items():
        assert (two[key] - tensor).abs().max() < 1e-6, key
