"""Tiny pipelines, built once a run: SD1.5-shaped (epsilon), SD2-shaped (v, tiny autoencoder) and SDXL-shaped."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import build_tiny_sd, build_tiny_sdxl

from pipelines import Generator, load_generator


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return {
        "sd15": build_tiny_sd(folder / "sd15"),
        "sd2": build_tiny_sd(folder / "sd2", prediction_type="v_prediction", vae="tiny"),
        "sdxl": build_tiny_sdxl(folder / "sdxl"),
    }


@pytest.fixture(params=["sd15", "sd2", "sdxl"])
def tiny_path(request: pytest.FixtureRequest, tiny_paths: dict[str, str]) -> str:
    return tiny_paths[request.param]


@pytest.fixture
def generator(tiny_path: str) -> Generator:
    """One generator of each kind."""
    return load_generator(tiny_path)


@pytest.fixture
def sd15(tiny_paths: dict[str, str]) -> Generator:
    return load_generator(tiny_paths["sd15"])
