"""Every shipped recipe for a flow model passes `--dry-run` on a tiny model of its class; new files are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from flow_tools import Models
from tiny_runs import write_pairs

from mmalign.cli import main
from mmalign.config.run import load_config
from mmalign.config.yaml import list_configs
from mmalign.methods import methods

FAMILIES = {"sd35": "sd3", "flux": "flux", "qwen_image": "qwen_image", "z_image": "z_image"}
NAMES = [name for name in list_configs() if name.split("/")[0] in FAMILIES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_pairs(made, 4)
    return made


def test_every_family_has_recipes() -> None:
    assert {name.split("/")[0] for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_model(
    models: Models, folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(name)
    model = models[FAMILIES[name.split("/")[0]]]
    source = next(key for key in ("pairs", "labels", "prompts") if getattr(config.data, key) is not None)
    files = {"prompts": tmp_path / "prompts.txt"}
    step = config.trainer.batch_size * config.trainer.gradient_accumulation
    files["prompts"].write_text("".join(f"{number} stars\n" for number in range(step)))
    given = [f"model={model}", f"data.{source}={files.get(source, folder / 'pairs.jsonl')}"]
    given += [f"data.cache={folder / 'cache'}", f"output={tmp_path / 'out'}", "data.resolution=16"]
    given += ["flow.text_length=64", "evaluate=null", "trainer.precision=fp32"]
    if source != "prompts":
        given += ["trainer.batch_size=2", "trainer.gradient_accumulation=1"]
    if methods.get(config.method_name).needs.reward != "none" and config.rewards:
        given += ["rewards=[tiny_runs:Brightness]"]
    assert main(["train", name, *given, "--dry-run"]) == 0
    told = capsys.readouterr().err
    grid = "on the unshifted grid" if name.startswith(("flux/", "qwen_image/")) else "on that grid"
    density = config.flow.density if config.flow else "uniform"
    assert "16 x 16 pixels, 64 text tokens" in told and f"training levels {density}" in told and grid in told
    # Hub ids are those of base models: nothing distilled is trained by default.
    assert not config.allow_distilled and "turbo" not in config.model.lower()
