"""Names to classes, imported only when asked for: built-in, installed plug-in (entry point) or dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmalign.core.errors import UserError, did_you_mean


class Registry:
    """Look up one kind of thing by name.

    Args:
        kind: the word used in messages, such as "method".
        builtin: name -> "module:attribute".
        entry_point_group: the group under which installed packages offer their own, such as "mmalign.methods".
    """

    def __init__(self, kind: str, builtin: Mapping[str, str], entry_point_group: str | None = None) -> None:
        """Keep the table; nothing is imported."""
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._builtin = dict(builtin)
        self._registered: dict[str, Any] = {}

    def register(self, target: Any) -> Any:
        """Make a class known under its `name` in this process, for one that no other could import; a decorator too.

        A class that is defined again at the same place, as by running a notebook's cell twice, replaces the earlier.

        Raises:
            UserError: it has no `name`, or another class goes by it.
        """
        name = getattr(target, "name", None)
        if not isinstance(target, type) or not isinstance(name, str) or not name or ":" in name:
            raise UserError(f"{target!r} is no {self.kind}: register a class with an attribute `name`, without ':'")
        held = self._registered.get(name)
        if name in self._builtin or name in self._plugins() or (held and not is_redefined(held, target)):
            raise UserError(f"{self.kind} name '{name}' is taken; give {target.__qualname__} a name of its own")
        self._registered[name] = target
        return target

    def name_of(self, target: type) -> str:
        """Return how a configuration names a class: by its name, by its dotted path, or else registered here.

        Raises:
            UserError: see `register`.
        """
        name = getattr(target, "name", "")
        if name in self and self.get(name) is target:
            return str(name)
        return dotted_path(target) or str(self.register(target).name)

    def names(self) -> list[str]:
        """Return every name that `get` knows, sorted; a dotted path is always understood besides."""
        return sorted({*self._builtin, *self._registered, *self._plugins()})

    def __contains__(self, name: str) -> bool:
        """Tell whether `name` is a known name (a dotted path is not)."""
        return name in self._builtin or name in self._registered or name in self._plugins()

    def get(self, name: str) -> Any:
        """Import and return what `name` stands for; a built-in wins over a plug-in of the same name.

        Raises:
            UserError: the name is unknown, or what it names cannot be imported.
        """
        if name in self._builtin:
            return self._load(name, self._builtin[name])
        if name in self._registered:
            return self._registered[name]
        plugin = self._plugins().get(name)
        if plugin is not None:
            return self._load(name, plugin.value)
        if ":" in name:
            return self._load(name, name)
        known = ", ".join(self.names()) or "none"
        raise UserError(
            f"unknown {self.kind} '{name}'{did_you_mean(name, self.names())} (known: {known}; "
            f"or your own as 'package.module:Class')"
        )

    def _plugins(self) -> dict[str, EntryPoint]:
        if self.entry_point_group is None:
            return {}
        return {point.name: point for point in entry_points(group=self.entry_point_group)}

    def _load(self, name: str, target: str) -> Any:
        module_name, _, attribute = target.partition(":")
        if name not in self._builtin and os.getcwd() not in sys.path:
            # A console script does not search the working directory, where people keep their own methods. It goes
            # last, so that no file there can shadow an installed module.
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"{self.kind} '{name}': cannot import {module_name}: {error}") from error
        try:
            return getattr(module, attribute)
        except AttributeError:
            offered = [word for word in vars(module) if not word.startswith("_")]
            raise UserError(
                f"{self.kind} '{name}': {module_name} has no '{attribute}'{did_you_mean(attribute, offered)}"
            ) from None


def dotted_path(target: type) -> str | None:
    """Return "module:Class" if another process finds the class by it, None for one of a notebook or a function."""
    found = sys.modules.get(target.__module__)
    if target.__module__ == "__main__" or getattr(found, target.__qualname__, None) is not target:
        return None
    return f"{target.__module__}:{target.__qualname__}"


def is_redefined(old: type, new: type) -> bool:
    """Tell whether `new` is what the definition of `old` has become, as after a notebook's cell has run again."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


methods = Registry(
    "method",
    {
        "align_prop": "mmalign.methods.align_prop:AlignProp",
        "capo": "mmalign.methods.capo:CaPO",
        "ddpo": "mmalign.methods.ddpo:DDPO",
        "dense_dpo": "mmalign.methods.dense_dpo:DenseDPO",
        "diffusion_dpo": "mmalign.methods.diffusion_dpo:DiffusionDPO",
        "diffusion_dro": "mmalign.methods.diffusion_dro:DiffusionDRO",
        "diffusion_kto": "mmalign.methods.diffusion_kto:DiffusionKTO",
        "inpo": "mmalign.methods.inpo:InPO",
        "lpo": "mmalign.methods.lpo:LPO",
        "mapo": "mmalign.methods.mapo:MaPO",
        "prdp": "mmalign.methods.prdp:PRDP",
        "rdpo": "mmalign.methods.rdpo:RDPO",
        "rrpo": "mmalign.methods.rrpo:RRPO",
        "sft": "mmalign.methods.sft:SFT",
        "smpo": "mmalign.methods.smpo:SmPO",
        "spo": "mmalign.methods.spo:SPO",
        "temple": "mmalign.methods.temple:Temple",
        "tpo": "mmalign.methods.tpo:TPO",
        "vdpo": "mmalign.methods.vdpo:VDPO",
        "vlm_dpo": "mmalign.methods.vlm_dpo:VlmDPO",
        "vlm_sft": "mmalign.methods.vlm_sft:VlmSFT",
    },
    "mmalign.methods",
)
