"""errors, seeds, resources, registry and the check for shadowing modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmalign
from mmalign.config.yaml import find_config
from mmalign.core.errors import UserError, did_you_mean, nearest
from mmalign.core.registry import Registry
from mmalign.core.resources import find, resolve_model, resource_root
from mmalign.core.seeds import derive_seed
from mmalign.data.prompts import load_prompts


def test_nearest_match() -> None:
    assert nearest("PickScor", ["pickscore", "clip"]) == "pickscore"
    assert nearest("dpo", ["sft", "diffusion_dpo"]) == "diffusion_dpo"
    assert nearest("dpo", ["ddpo", "diffusion_dpo"]) == "diffusion_dpo"
    assert nearest("diffusion_dop", ["diffusion_dro", "diffusion_dpo"]) == "diffusion_dpo"
    assert (
        did_you_mean("dpo", ["ddpo", "dense_dpo", "diffusion_dpo"]) == "; did you mean 'dense_dpo' or 'diffusion_dpo'?"
    )
    assert nearest("zzz", ["pickscore", "clip"]) is None
    assert did_you_mean("clop", ["clip"]) == "; did you mean 'clip'?"
    assert did_you_mean("zzz", ["clip"]) == ""


class TestSeeds:
    def test_values_never_change(self) -> None:
        # Runs of the past are reproduced by these very numbers.
        assert derive_seed(0) == 7210762507766007076
        assert derive_seed(0, "pair-7", 3) == 181404312269674555

    def test_parts_are_kept_apart(self) -> None:
        seeds = [derive_seed(1, 23), derive_seed(12, 3), derive_seed("1", 23), derive_seed(1, "23"), derive_seed(123)]
        assert len(set(seeds)) == len(seeds)

    def test_range_and_types(self) -> None:
        assert all(0 <= derive_seed(i) < 2**63 for i in range(1000))
        assert derive_seed(np.int64(5), "a") == derive_seed(5, "a")
        with pytest.raises(TypeError, match="not float"):
            derive_seed(1.0)  # type: ignore[arg-type]


class TestResources:
    def test_as_given_first_then_shipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        name = "assets/prompts/shapes-validation.csv"
        assert find(name) == resource_root() / name
        (tmp_path / "assets" / "prompts").mkdir(parents=True)
        (tmp_path / name).touch()
        assert find(name) == Path(name)

    def test_only_what_ships_is_taken_from_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for read in (find, find_config, load_prompts):
            with pytest.raises(UserError, match="no such"):
                read("tests/core/test_basics.py")  # lies in a checkout, but is not what ships
        assert resolve_model("tests/core") == "tests/core"  # no such folder here: shaped like a hub id

    def test_missing_names_the_neighbour(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"did you mean 'assets/prompts/shapes-validation\.csv'\?"):
            find("assets/prompts/shapes-validatio.csv")
        (tmp_path / "runs").mkdir()
        with pytest.raises(UserError, match=r"'runs' exists, 'x' is not in it"):
            find("runs/x/pairs.parquet")
        with pytest.raises(UserError, match="among the files that mmalign ships"):
            find("nowhere.parquet")

    def test_models_by_path_or_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "tuned").mkdir(parents=True)
        assert resolve_model("runs/tuned") == "runs/tuned"
        assert resolve_model("stabilityai/sdxl-turbo") == "stabilityai/sdxl-turbo"
        assert resolve_model("assets/prompts") == str(resource_root() / "assets" / "prompts")
        with pytest.raises(UserError, match=r"model runs/tuned2: no such .*did you mean 'runs/tuned'\?"):
            resolve_model("runs/tuned2")  # a folder of that first part exists: a typo, not a hub id
        with pytest.raises(UserError, match="give a model directory or a hub id"):
            resolve_model("sdxl")


class TestRegistry:
    REGISTRY = Registry(
        "reward", {"path": "pathlib:Path", "broken": "no_such_module:X", "hollow": "pathlib:Pth"}, "none"
    )

    def test_builtin_and_dotted(self) -> None:
        assert self.REGISTRY.get("path") is Path
        assert self.REGISTRY.get("collections:OrderedDict").__name__ == "OrderedDict"
        assert self.REGISTRY.names() == ["broken", "hollow", "path"]
        assert "path" in self.REGISTRY and "collections:OrderedDict" not in self.REGISTRY

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pth", r"unknown reward 'pth'; did you mean 'path'\? \(known: broken, hollow, path; or your own as"),
            ("broken", "reward 'broken': cannot import no_such_module"),
            ("hollow", r"pathlib has no 'Pth'; did you mean 'Path'\?"),
        ],
    )
    def test_what_cannot_be_found(self, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            self.REGISTRY.get(name)

    def test_entry_points_of_installed_packages(self) -> None:
        plugins = Registry("test runner", {}, "console_scripts")
        assert "pytest" in plugins
        assert plugins.get("pytest").__name__.endswith("console_main")

    def test_classes_of_this_process(self) -> None:
        kinds = Registry("kind", {"path": "pathlib:Path"})

        def define(**values: object) -> type:
            return type("Mine", (), {"name": "mine", "__module__": "__main__", "__qualname__": "Mine", **values})

        first = kinds.register(define())
        assert kinds.get("mine") is first and "mine" in kinds and kinds.names() == ["mine", "path"]
        second = define()  # the cell of a notebook, run again
        assert kinds.name_of(second) == "mine" and kinds.get("mine") is second
        assert kinds.name_of(Registry) == "mmalign.core.registry:Registry"
        assert kinds.name_of(Path) == f"{Path.__module__}:Path"
        with pytest.raises(UserError, match="kind name 'mine' is taken; give Other a name of its own"):
            kinds.register(define(__qualname__="Other"))
        with pytest.raises(UserError, match="kind name 'path' is taken"):
            kinds.register(define(name="path"))
        with pytest.raises(UserError, match="is no kind: register a class with an attribute `name`"):
            kinds.register(define(name=""))

    def test_own_module_in_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "lonely_module.py").write_text("class Thing: pass\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert self.REGISTRY.get("lonely_module:Thing").__name__ == "Thing"


@pytest.mark.parametrize("shadow", ["rewards.py", "pipelines/__init__.py"])
def test_a_module_of_the_same_name_is_reported_not_used(tmp_path: Path, shadow: str) -> None:
    path = tmp_path / shadow
    path.parent.mkdir(exist_ok=True)
    path.touch()
    root = Path(mmalign.__file__).parent.parent
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; import mmalign"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: mmalign needs its package '{shadow.split('/')[0].split('.')[0]}'" in done.stderr
    assert f"{path} shadows it" in done.stderr
