"""A tiny model that predicts a velocity, and a run of it: for methods that learn by the forward process."""

from __future__ import annotations

import pytest
from tiny_models import build_tiny_sd
from tiny_runs import Brightness, exact_run

from mmalign.methods.run import Run
from mmalign.scoring.choice import WeightedReward


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("velocity") / "sd", "v_prediction", vae="tiny")


@pytest.fixture
def run(model: str) -> Run:
    return exact_run(model, rewards=[WeightedReward("brightness", 1.0, Brightness())])
