"""Who may import whom: pipelines and rewards stand alone, losses import torch alone, the house has no back doors."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"mmalign", "pipelines", "rewards"}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Yield the absolute name of every module that the source imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def imports_below(folder: str) -> list[tuple[str, str]]:
    """Return (file, imported module) for every Python file of a package."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    found = []
    for file in files:
        package = ".".join(file.relative_to(ROOT).parent.parts)
        found += [(str(file.relative_to(ROOT)), name) for name in imported_modules(file.read_text(), package)]
    return found


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("package", ["pipelines", "rewards"])
def test_pipelines_and_rewards_stand_alone(package: str) -> None:
    forbidden = OWN - {package}
    assert [(file, name) for file, name in imports_below(package) if within(name, forbidden)] == []


def test_losses_import_torch_alone() -> None:
    allowed = {"torch", "jaxtyping", "mmalign.losses", *sys.stdlib_module_names}
    assert [(file, name) for file, name in imports_below("mmalign/losses") if not within(name, allowed)] == []


def test_methods_know_no_model_library() -> None:
    # A method that asks which family it runs on would have to import it.
    forbidden = {"diffusers", "transformers", "peft", "accelerate", "mmalign.cli"}
    assert [(file, name) for file, name in imports_below("mmalign/methods") if within(name, forbidden)] == []


def test_nothing_imports_the_command_line() -> None:
    doors = ("mmalign/cli/", "mmalign/__main__.py")
    found = [(file, name) for file, name in imports_below("mmalign") if not file.startswith(doors)]
    assert [(file, name) for file, name in found if within(name, {"mmalign.cli"})] == []


def test_the_walk_sees_every_form_of_import() -> None:
    source = "\n".join(
        [
            "import mmalign.core.errors as e",
            "from rewards import clip",
            "from . import noise",
            "from ..deep import thing",
            "def f():\n    import pipelines.noise",
            "importlib.import_module('mmalign.cli')",
        ]
    )
    assert set(imported_modules(source, "pipelines.inner")) == {
        "mmalign.core.errors",
        "rewards",
        "rewards.clip",
        "pipelines.inner",
        "pipelines.inner.noise",
        "pipelines.deep",
        "pipelines.deep.thing",
        "pipelines.noise",
        "mmalign.cli",
    }
