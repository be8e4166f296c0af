"""The accelerator follows the config, whatever `accelerate launch` left in the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config.run import RunConfig
from mmalign.core.errors import UserError
from mmalign.training.accelerator import make_accelerator


def config_of(output: Path, **trainer: Any) -> RunConfig:
    return RunConfig(
        model="m", method={"name": "sft"}, data={"pairs": "p"}, output=str(output), trainer={"steps": 4, **trainer}
    )


@pytest.mark.parametrize("launched", [None, "1", "4"])
def test_gradients_are_scaled_by_nobody_but_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str | None
) -> None:
    if launched:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", launched)
    accelerator = make_accelerator(config_of(tmp_path, gradient_accumulation=4))
    weight = torch.nn.Parameter(torch.tensor(3.0))
    accelerator.backward(weight**2)
    assert weight.grad is not None and weight.grad.item() == 6.0


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "trainer.gradient_accumulation"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "trainer.precision"),
    ],
)
def test_an_environment_that_contradicts_the_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, key: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}={value}.*{key}"):
        make_accelerator(config_of(tmp_path, gradient_accumulation=4, precision="bf16"))


def test_the_environment_of_a_plain_launch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert make_accelerator(config_of(tmp_path, precision="bf16")).mixed_precision == "bf16"
