"""Modules under the names that they had in release 0.1.0, so that plug-ins written for it still import them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class MovedModules(MetaPathFinder, Loader):
    """Import a module by its old name: the result is the module itself, loaded once, not a copy.

    table: old name -> new name, such as "rewards.preprocess" -> "rewards.backbones.preprocess".
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        """Keep the table."""
        self.table = dict(table)
        self._specs: dict[str, Any] = {}

    def install(self) -> None:
        """Ask the table last, after everything else has failed to find a name."""
        sys.meta_path.append(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for an old name, None for any other."""
        return ModuleSpec(name, self) if name in self.table else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module under its new name."""
        module = import_module(self.table[spec.name])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import of the old name has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)


def into(folder: str, *names: str, package: str = "rewards") -> dict[str, str]:
    """Return a table for modules of a package that moved into a folder of it under the same names."""
    return {f"{package}.{name}": f"{package}.{folder}.{name}" for name in names}


MOVED = {
    **into("backbones", "blip", "chat", "checkpoints", "clip_t5", "detectors", "heads", "hf", "hf_encoder"),
    **into("backbones", "instruction", "latent_files", "latent_network", "mps_cross", "open_clip_encoder"),
    **into("backbones", "preprocess", "truncation", "vlm", "weights"),
    **into("bases", "cross_encoder", "derived", "observed", "qwen2_vl", "references", "two_tower"),
    **into("combining", "combine_modes", "combine_parts", "shaping", "transforms"),
    **into("language", "contrast", "contrast_rules", "english", "geneval_tasks"),
    "rewards.encoders": "rewards.bases.encoder",
}
