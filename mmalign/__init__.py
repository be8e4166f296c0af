"""mmalign: fine-tune image, video and vision-language models from preferences, score them, compare them fairly."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__version__ = "0.1.0"


def _check_sibling(name: str) -> None:
    """Refuse to go on with somebody else's top-level module of a common name.

    Raises:
        ImportError: `name` is missing, or what is found first is not the package installed beside mmalign.
    """
    spec = importlib.util.find_spec(name)
    own = Path(__file__).resolve().parent.parent / name
    if spec is None:
        raise ImportError(f"mmalign needs its package '{name}' in {own}, which is missing; install mmalign again")
    folders = [str(folder) for folder in spec.submodule_search_locations or []]
    if not any(Path(folder).resolve() == own for folder in folders):
        found = spec.origin or ", ".join(folders)
        raise ImportError(
            f"mmalign needs its package '{name}' in {own}, but {found} shadows it; rename that file or folder, or "
            "start Python elsewhere (the working directory and PYTHONPATH are searched first)"
        )


for _name in ("pipelines", "rewards"):
    _check_sibling(_name)
