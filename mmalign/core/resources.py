"""Find the files that ship with mmalign (configs, models, prompt sets), in a checkout or in an installed wheel."""

from __future__ import annotations

import re
from pathlib import Path

from mmalign.core.errors import MissingPath, UserError, nearest
from mmalign.core.files import exists, expand, is_dir

_SHIPPED = ("configs", "assets")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def resource_root() -> Path:
    """Return the directory that holds `configs/` and `assets/`: `mmalign/_data` in a wheel, else the checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "_data"
    return packaged if packaged.is_dir() else package.parent


def find(path: str | Path) -> Path:
    """Return `path` if it exists, else the shipped file or folder of that name in `configs/` or `assets/`.

    Raises:
        MissingPath: neither exists; the message names the nearest existing path.
    """
    given = expand(path)
    if exists(given):
        return given
    ours = shipped(given)
    if ours is not None and exists(ours):
        return ours
    raise MissingPath(path, _path_hint(given))


def shipped(given: Path) -> Path | None:
    """Return where `given` would lie among the shipped files; None if it is not in `configs/` or `assets/`.

    In a checkout the shipped files lie in its root, but its `runs/` and `tests/` do not belong to them: a command
    that is called elsewhere must not read those because a name matches.
    """
    return resource_root() / given if given.parts[:1] and given.parts[0] in _SHIPPED else None


def resolve_model(name: str) -> str:
    """Return the argument of the model loader for `name`: a directory found by `find`, or a hub id unchanged.

    `org/name` counts as a hub id when no such path exists and its first part is no local directory either
    (`runs/demo/dpp` is a mistyped path, not a hub account).

    Raises:
        UserError: `name` is neither an existing path nor shaped like a hub id.
    """
    if is_hub_id(name):
        return name
    try:
        return str(find(name))
    except UserError as error:
        raise UserError(f"model {error} (give a model directory or a hub id 'organisation/name')") from None


def is_hub_id(name: str) -> bool:
    """Tell whether a name is shaped like a hub id, `org/name[@revision]`, and is no path here; see `resolve_model`."""
    given = expand(name)
    lies_nowhere = not exists(given) and shipped(given) is None and not is_dir(given.parts[0])
    return lies_nowhere and _HUB_ID.fullmatch(name) is not None


def _path_hint(missing: Path) -> str:
    """Describe the nearest existing neighbour of a missing path, or the places that were searched."""
    for folder in (missing.parent, shipped(missing.parent)):
        if folder is not None and is_dir(folder):
            match = nearest(missing.name, (entry.name for entry in folder.iterdir()))
            if match:
                return f"; did you mean '{missing.parent / match}'?"
    existing = next((parent for parent in missing.parents if is_dir(parent) and str(parent) != "."), None)
    if existing is None and not missing.is_absolute():
        return f" in {Path.cwd()} or among the files that mmalign ships"
    return f" ('{existing}' exists, '{missing.relative_to(existing).parts[0]}' is not in it)" if existing else ""
