"""Models distilled to few steps are not trained on their own samples, unless the recipe allows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flow_tools import Models
from tiny_models import build_tiny_sdxl
from tiny_runs import BRIGHTNESS

from mmalign.config.run import load_config
from mmalign.core.errors import UserError
from mmalign.training.family import check_family
from pipelines.load import distillation

SMALL = ("model_index.json", "transformer/config.json", "unet/config.json", "scheduler/scheduler_config.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    found = Models(tmp_path_factory.mktemp("distilled"))
    found["sdxl"] = build_tiny_sdxl(found.folder / "sdxl")
    return found


def files_alone(model: str, folder: Path, **index: Any) -> Path:
    """Copy a model's configurations, without a weight; `index` replaces keys of its index."""
    for name in SMALL:
        if (Path(model) / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(model) / name, folder / name)
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    return folder


def recipe(model: Path, method: str, **values: Any) -> Any:
    data = {"pairs": "pairs.parquet"} if method == "diffusion_dpo" else {"prompts": "shapes-train"}
    rewards = [] if method == "diffusion_dpo" else [BRIGHTNESS]
    chosen = {"name": method} if method == "diffusion_dpo" else {"name": method, "guidance": 1.0}
    given = {"model": str(model), "method": chosen, "output": "runs/x", "data": data, "rewards": rewards}
    return load_config(given | values)


@pytest.mark.parametrize(
    ("name", "folder", "index", "evidence"),
    [
        ("schnell", "fast", {}, "guidance_embeds false in transformer/config.json, as in FLUX.1-schnell"),
        ("flux2 distilled", "klein", {}, "is_distilled in model_index.json"),
        ("z_image", "Z-Image-Turbo", {}, "'turbo' in its name Z-Image-Turbo"),
        ("z_image", "mine", {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, "'turbo' in its name Tongyi-MAI/Z-Image-"),
        ("sdxl", "sdxl_lightning_4step", {}, "'lightning' in its name"),
        ("sdxl", "lcm-made", {"scheduler": ["diffusers", "LCMScheduler"]}, "its scheduler LCMScheduler"),
    ],
)
@pytest.mark.parametrize("method", ["ddpo", "align_prop"])
def test_distilled_models_are_refused_before_a_weight_is_read(
    models: Models, tmp_path: Path, name: str, folder: str, index: dict[str, Any], evidence: str, method: str
) -> None:
    model = files_alone(models[name], tmp_path / folder, **index)
    with pytest.raises(UserError) as caught:
        check_family(recipe(model, method))
    assert evidence in str(caught.value) and str(caught.value).endswith("or set allow_distilled: true")
    assert len(str(caught.value).splitlines()) == 1
    check_family(recipe(model, method, allow_distilled=True))
    check_family(recipe(model, "diffusion_dpo"))  # pairs of others say nothing about few steps


def test_rounds_sample_their_own(models: Models, tmp_path: Path) -> None:
    model = files_alone(models["z_image"], tmp_path / "z-turbo")
    rounds = {"count": 2, "prompts": "shapes-train", "reward": "shapes-quality"}
    with pytest.raises(UserError, match="distilled to few sampling steps"):
        check_family(recipe(model, "diffusion_dpo", data={}, rounds=rounds))


def test_base_models_are_not_called_distilled(models: Models) -> None:
    assert [distillation(models[name]) for name in ("sd3", "flux", "z_image", "qwen_image", "flux2", "sdxl")] == [
        None
    ] * 6
