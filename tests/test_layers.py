"""Who may import whom: one ordered list of rooms, lazy imports included, and no circle between files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mmalign", "pipelines", "rewards")
# From the ground up. A room imports rooms of lower floors; rooms of one floor do not import each other. `pipelines`,
# `rewards` and `mmalign.losses` stand on the ground, on nothing.
FLOORS = (
    {"pipelines", "rewards", "losses"},
    {"core"},
    {"config"},
    {"shapes"},
    {"scoring", "data"},
    {"methods"},
    {"training"},
    {"compare"},
    {"api"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
APART = {
    ("shapes", "config"),
    ("config", "losses"),
    ("core", "losses"),
    # Shapes joins by the tables of `mmalign.core.registry`, as anybody's videos, captions and rewards would.
    *((room, "shapes") for room in ("scoring", "data", "methods", "training", "compare")),
}
"""Rooms that do not import each other though their floors would let them."""


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}
FACES = {module for module, file in FILES.items() if file.name == "__init__.py"} | {"mmalign.run", "mmalign.batches"}
"""Modules that only hand on names of others, for plug-ins and notebooks; what they import ties nothing together."""


def imported_names(source: str, package: str) -> Iterator[str]:
    """Yield the dotted name of all that the source imports, in functions too; what serves types alone is left out."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def holder(name: str) -> str | None:
    """Return the module of ours that a dotted name lies in."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


def imports_of(module: str) -> set[str]:
    """Return the modules of ours that a module imports."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = {holder(name) for name in imported_names(file.read_text(), package)}
    return {name for name in found if name is not None and name != module}


def room_of(module: str) -> str:
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "mmalign" and rest else first


IMPORTS = {module: imports_of(module) for module in FILES}


def test_rooms_import_lower_floors_alone() -> None:
    wrong = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if (mine := room_of(module)) != (theirs := room_of(other))
        and mine in FLOOR
        and (theirs not in FLOOR or FLOOR[theirs] >= FLOOR[mine] or (mine, theirs) in APART)
    ]
    assert wrong == []


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "mmalign").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(FLOOR) - {"pipelines", "rewards"}
    loose = {path.stem for path in (ROOT / "mmalign").glob("*.py")}
    assert loose == {"__init__", "__main__", "run", "batches"}


def test_no_circle_between_files() -> None:
    graph = {m: {other for other in others if other not in FACES} for m, others in IMPORTS.items() if m not in FACES}
    assert circles(graph) == []


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the modules that lie on a circle, by taking away again and again what imports nothing that is left."""
    left = {module: set(others) for module, others in graph.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    while unused := left.keys() - {other for others in left.values() for other in others}:
        left = {module: others for module, others in left.items() if module not in unused}
    return [sorted(left)] if left else []


@pytest.mark.parametrize("package", ["pipelines", "rewards"])
def test_pipelines_and_rewards_stand_alone(package: str) -> None:
    forbidden = set(PACKAGES) - {package}
    mine = {module: others for module, others in IMPORTS.items() if module.partition(".")[0] == package}
    assert mine and [m for m, others in mine.items() if {o.partition(".")[0] for o in others} & forbidden] == []


def test_losses_import_torch_alone() -> None:
    allowed = {"torch", "jaxtyping", *sys.stdlib_module_names}
    names = [
        (module, name)
        for module, file in FILES.items()
        if room_of(module) == "losses"
        for name in imported_names(file.read_text(), module if file.name == "__init__.py" else "mmalign.losses")
    ]
    assert (
        names
        and [
            pair
            for pair in names
            if not pair[1].startswith("mmalign.losses") and pair[1].partition(".")[0] not in allowed
        ]
        == []
    )


def test_methods_know_no_model_library() -> None:
    # A method that asks which family it runs on would have to import it.
    forbidden = {"diffusers", "transformers", "peft", "accelerate"}
    names = [(m, n) for m, f in FILES.items() if room_of(m) == "methods" for n in imported_names(f.read_text(), m)]
    assert names and [pair for pair in names if pair[1].partition(".")[0] in forbidden] == []


def test_the_walk_sees_every_form_of_import() -> None:
    source = "\n".join(
        [
            "from typing import TYPE_CHECKING",
            "import mmalign.core.errors as e",
            "from rewards import clip",
            "from . import noise",
            "from ..deep import thing",
            "def f():\n    import pipelines.noise",
            "importlib.import_module('mmalign.cli')",
            "if TYPE_CHECKING:\n    import mmalign.training",
        ]
    )
    assert set(imported_names(source, "pipelines.inner")) == {
        "typing.TYPE_CHECKING",
        "mmalign.core.errors",
        "rewards.clip",
        "pipelines.inner.noise",
        "pipelines.deep.thing",
        "pipelines.noise",
        "mmalign.cli",
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
