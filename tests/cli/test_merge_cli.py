"""`mmalign merge`: one model that does what base and adapter did, of either kind; nothing is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_vlms import build_llava_onevision

from mmalign.cli import main
from pipelines import load_generator, load_vlm, sample


def _moved(model: Any, folder: Path) -> Any:
    """Give a model an adapter that does something, and write it as a training would."""
    model.add_adapter(2, seed=1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.2)
    model.save_lora(folder)
    (folder / "config.yaml").write_text("method: {name: sft}\n")
    return model


def _picture(generator: Any) -> torch.Tensor:
    return sample(generator, generator.encode_prompts(["red circle"]), seeds=[3], steps=2).latents


def _answer(model: Any) -> torch.Tensor:
    video = torch.arange(4 * 3 * 16 * 16, dtype=torch.float32).reshape(4, 3, 16, 16) % 256
    return model.log_probs(model.encode(["what?"], [[video.to(torch.uint8)]], ["it falls"]))[0]


@pytest.mark.parametrize(
    ("build", "load", "says"),
    [
        (lambda path: build_tiny_sd(path, vae="tiny"), load_generator, _picture),
        (build_llava_onevision, load_vlm, _answer),
    ],
    ids=["image", "vlm"],
)
@torch.no_grad()
def test_the_merged_model_says_what_base_and_adapter_said(
    build: Callable[[Path], str],
    load: Callable[..., Any],
    says: Callable[[Any], torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = build(tmp_path / "base")
    tuned = _moved(load(base, device="cpu"), tmp_path / "lora")
    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "lora"), "--out", str(merged)]) == 0
    whole = load(merged, device="cpu")
    assert not whole.has_adapter
    torch.testing.assert_close(says(whole), says(tuned), rtol=1e-4, atol=1e-4)
    assert (says(whole) - says(load(base, device="cpu"))).abs().max() > 1e-2
    assert (merged / "config.yaml").read_text() == "method: {name: sft}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "merged"]

    assert main(["merge", str(tmp_path / "lora"), "--out", str(merged)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", str(merged), "--out", str(tmp_path / "again")]) == 2
    assert "is a whole model already" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["merge", str(tmp_path / "empty"), "--out", str(tmp_path / "again")]) == 2
    assert "holds no adapter" in capsys.readouterr().err
