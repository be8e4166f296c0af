"""Every image method, from its config to its export, on every family of model, LoRA and full."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from invariant.trajectories import IMAGES, build_models, image_run
from tiny_runs import losses

from mmalign.methods import methods
from mmalign.training.output import is_finished

FAMILIES, KINDS = ("sd15", "sd21-v", "sdxl"), ("lora", "full")
NAMES = [name for name in methods.names() if methods.get(name).needs.modality == "image"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_models(tmp_path_factory.mktemp("families"))


def test_no_method_is_left_out() -> None:
    assert set(IMAGES) == set(NAMES)


@pytest.mark.slow  # in the quick suite `tests/invariant` trains every method on one family
@pytest.mark.parametrize(("name", "family", "kind"), product(NAMES, FAMILIES, KINDS))
def test_it_trains_every_family(name: str, family: str, kind: str, models: dict[str, str], tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 4} if kind == "lora" else {"kind": "full"}
    output = image_run(name, models[family], tmp_path, steps=2, learning_rate=1e-4, adapter=adapter)
    assert is_finished(output) and set(losses(output)) == {1, 2}
