"""Runs that must be one: micro-batches, accumulation, checkpointing, a cached reference and processes trade places.

A step of four samples is the same step however it is made up, for every method. What is drawn depends on the sample
and the step alone, losses are means, and gradients add up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invariant.trajectories import ANSWERS, IMAGES, NEEDS_VELOCITY, answer_run, build_models, image_run
from tiny_runs import losses

TKTO = {"tkto": {"objective": "tkto"}}
"""The other objective of `tpo`, in which captions are good or bad by themselves."""
NAMES = [*IMAGES, *TKTO, *ANSWERS]
WHOLE = {"batch_size": 4}
HALVES = {"batch_size": 2, "gradient_accumulation": 2}
SINGLE = {"batch_size": 1, "gradient_accumulation": 4}
CHECKPOINTED = {"batch_size": 4, "gradient_checkpointing": True}
COMMON = {"steps": 2, "max_grad_norm": 1e6}
LEARNING_RATE = {"diffusion_kto": 1e-2, "tkto": 1e-2}  # the reference point is 0 until the weights have moved


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a method in one micro-batch a step, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = train_it(name, models, tmp_path_factory.mktemp(name), **WHOLE)
        return made[name]

    return get


def train_it(name: str, models: dict[str, str], folder: Path, **changes: Any) -> Path:
    changes = {**COMMON, "learning_rate": LEARNING_RATE.get(name, 1e-4), **changes}
    if name in (*IMAGES, *TKTO):
        model = models["sd21-v" if name in NEEDS_VELOCITY else "sd15"]
        return image_run("tpo" if name in TKTO else name, model, folder, TKTO.get(name), **changes)
    return answer_run(name, models["vlm"], folder, count=8 if name == "temple" else 6, **changes)


def check(one: Path, other: Path) -> None:
    """Compare what both logged; the second step sees what the first has done to the weights."""
    assert set(losses(one)) == set(losses(other)) == {1, 2}
    assert losses(other)[1] == pytest.approx(losses(one)[1], rel=1e-5, abs=1e-6)
    assert losses(other, "grad_norm")[1] == pytest.approx(losses(one, "grad_norm")[1], rel=1e-3, abs=1e-6)
    # Adam turns a gradient that is zero but for rounding into a whole step, hence the wider tolerance.
    assert losses(other)[2] == pytest.approx(losses(one)[2], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_make_up_the_step(
    name: str, models: dict[str, str], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    check(whole(name), train_it(name, models, tmp_path, **HALVES))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SINGLE, CHECKPOINTED, {**HALVES, **CHECKPOINTED, "batch_size": 2}])
@pytest.mark.parametrize("name", NAMES)
def test_every_other_way_makes_up_the_step(
    name: str, changes: dict[str, Any], models: dict[str, str], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    check(whole(name), train_it(name, models, tmp_path, **changes))


@pytest.mark.parametrize("name", ["vlm_dpo", "rdpo"])
def test_a_cached_reference_is_the_live_one(
    name: str, models: dict[str, str], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {**ANSWERS[name], "reference": "precomputed"}
    check(whole(name), answer_run(name, models["vlm"], tmp_path, options, **COMMON, learning_rate=1e-4, **HALVES))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "temple"])  # stages are for one process
def test_two_processes_make_up_the_step(name: str, models: dict[str, str], tmp_path: Path) -> None:
    """Two gloo processes with one micro-batch of two each, against one process with two micro-batches."""
    code = (
        "import sys; from pathlib import Path; from invariant.test_equivalence import train_it; "
        f"train_it({name!r}, {models!r}, Path({str(tmp_path / 'two')!r}), batch_size=2)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(launcher, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one = train_it(name, models, tmp_path / "one", **HALVES)
    check(one, tmp_path / "two" / "out")
