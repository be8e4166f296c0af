"""mmalign: fine-tune image, video and vision-language models from preferences, score them, compare them fairly.

```python
import mmalign

result = mmalign.train("shapes/diffusion_dpo", pairs=pairs, trainer={"steps": 100}, output="runs/mine")
images = mmalign.generate(result, ["a red circle", "two green stars"], seeds=[0, 1])
scores = mmalign.score(images, rewards="shapes-clip")
outcome = mmalign.compare({"base": "assets/shapes-sd", "mine": result}, prompts=[...], rewards=[...], output="runs/c")
```

Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mmalign.core.version import __version__

if TYPE_CHECKING:
    from mmalign.api.compare import compare
    from mmalign.api.generate import generate, load_generator, load_vlm
    from mmalign.api.score import score
    from mmalign.api.train import train
    from mmalign.config.run import load_config
    from mmalign.methods.base import Method
    from rewards import Reward, load_reward

__all__ = [
    "Method",
    "Reward",
    "__version__",
    "compare",
    "generate",
    "load_config",
    "load_generator",
    "load_reward",
    "load_vlm",
    "score",
    "train",
]
_HOMES = {
    "Method": "mmalign.methods.base",
    "Reward": "rewards",
    "generate": "mmalign.api.generate",
    "load_config": "mmalign.config.run",
    "load_generator": "mmalign.api.generate",
    "load_reward": "rewards",
    "load_vlm": "mmalign.api.generate",
    "score": "mmalign.api.score",
    "train": "mmalign.api.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "compare":
        return importlib.import_module("mmalign.compare")  # which `_Package` makes callable
    if name not in _HOMES:
        raise AttributeError(f"module 'mmalign' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Name what there is, imported or not."""
    return sorted({*globals(), *__all__})


class _ComparePackage(ModuleType):
    """The package `mmalign.compare`, callable as the function of that name: `mmalign.api.compare.compare`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from mmalign.api.compare import compare

        return compare(*args, **options)

    @property
    def __signature__(self) -> Any:
        import inspect

        from mmalign.api.compare import compare

        return inspect.signature(compare)


class _Package(ModuleType):
    """This module: `compare` is the name of a function and of a package, which Python binds here on its import."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compare" and isinstance(value, ModuleType):
            value.__class__ = _ComparePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


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

from mmalign.core.moved import MOVED  # noqa: E402 (imports of `rewards` come after the check)
from rewards.moved import MovedModules  # noqa: E402

MovedModules(MOVED).install()
