"""Models in folders of any name can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.compare.config import as_folder_name, make_compare_config, name_models
from mmalign.core.errors import UserError


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("my run", "my-run"),
        ("run (2)", "run-2"),
        ("try #2 [b]", "try-2-b"),
        ("Modèle é", "Modele-e"),
        (".hidden", "hidden"),
        ("a.b_c+d-e", "a.b_c+d-e"),
        ("--x--", "x"),
        ("模型", ""),
    ],
)
def test_a_name_is_made_of_any_folder(given: str, name: str) -> None:
    assert as_folder_name(given) == name


def test_names_of_models(tmp_path: Path) -> None:
    for name in ("my run", "a b/model", "c/model", "模型"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("my run", "a b/model", "c/model")]
    names = name_models([*paths, "org/name"])
    assert names == ["my-run", "a-b-model", "c-model", "name"]
    systems = [{"name": name, "model": "m"} for name in names]
    config = make_compare_config(systems=systems, prompts="p", rewards=["clip"], output="o")
    assert [system.name for system in config.systems] == names
    with pytest.raises(UserError, match=r"no letters or digits to be named by; name the models by --names A,B"):
        name_models([paths[0], str(tmp_path / "模型")])
    with pytest.raises(UserError, match=r"would all be named 'm'; name the models by --names"):
        name_models(["org/m", "other/m"])
