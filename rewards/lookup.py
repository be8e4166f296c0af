"""Names to classes, imported on first use: built in, registered, offered by an installed package, or a dotted path."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

from rewards.errors import RewardError, did_you_mean


class Lookup:
    """Look up one kind of thing by name.

    Args:
        kind: the word used in messages, such as "method".
        builtin: name -> "module:attribute".
        group: the group of entry points under which installed packages offer their own, such as "mmalign.methods".
        error: the class of the errors.
        hint: returns "; did you mean 'x'?" for a word and the words that are allowed, or nothing.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, str],
        group: str | None = None,
        error: type[Exception] = RewardError,
        hint: Callable[[str, Iterable[str]], str] = did_you_mean,
    ) -> None:
        """Keep the table; nothing is imported."""
        self.kind, self.group = kind, group
        self._builtin, self._error, self._hint = dict(builtin), error, hint
        self._registered: dict[str, Any] = {}

    def register(self, target: Any) -> Any:
        """Make a class known under its `name` in this process, for one that no other could import; a decorator too.

        A class defined again at the same place, as by a notebook's cell that runs twice, replaces the earlier one.

        Raises:
            error: it has no `name`, or another class has it.
        """
        name = getattr(target, "name", None)
        if not isinstance(target, type) or not isinstance(name, str) or not name or ":" in name:
            raise self._error(f"{target!r} is no {self.kind}: register a class with an attribute `name`, without ':'")
        held = self._registered.get(name)
        if name in self._targets() or (held and _place(held) != _place(target)):
            raise self._error(f"{self.kind} name '{name}' is taken; give {target.__qualname__} a name of its own")
        self._registered[name] = target
        return target

    def names(self) -> list[str]:
        """Return every known name, sorted; dotted paths are not listed."""
        return sorted({*self._targets(), *self._registered})

    def __contains__(self, name: str) -> bool:
        """Tell whether `name` is a known name (a dotted path is not)."""
        return name in self._registered or name in self._targets()

    def get(self, name: str) -> Any:
        """Return the class of a name or of a path "package.module:Class", importing it.

        Raises:
            error: the name is unknown or claimed by two packages, or its target cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        targets = self._targets().get(name, {name} if ":" in name else set())
        if not targets:
            known = self.names()
            raise self._error(
                f"unknown {self.kind} '{name}'{self._hint(name, known)} (known: {', '.join(known) or 'none'}; "
                "or your own as 'package.module:Class')"
            )
        if len(targets) > 1:
            raise self._error(
                f"{self.kind} name '{name}' is claimed by {', '.join(sorted(targets))}; uninstall one of them"
            )
        return self._import(name, *targets)

    def _targets(self) -> dict[str, set[str]]:
        """Return the possible targets of each name that is not registered."""
        found = {name: {target} for name, target in self._builtin.items()}
        for name, targets in _entry_points(self.group, tuple(sys.path)).items() if self.group else ():
            found[name] = found.get(name, set()) | targets
        return found

    def _import(self, name: str, target: str) -> Any:
        module, _, attribute = target.partition(":")
        own = name == target
        if own and os.getcwd() not in sys.path:
            # A console script does not search the working directory, where people keep their own modules. It goes
            # last, so that no file there can shadow an installed module.
            sys.path.append(os.getcwd())
        try:
            loaded = import_module(module)
        except Exception as cause:  # ImportError; or whatever the module itself raises, or its name
            where = "; a module of yours must be on PYTHONPATH" if own and isinstance(cause, ImportError) else ""
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise self._error(f"{self.kind} '{name}': cannot import {module}: {reason}{where}") from cause
        try:
            return getattr(loaded, attribute)
        except AttributeError:
            offered = [word for word in vars(loaded) if not word.startswith("_")]
            raise self._error(
                f"{self.kind} '{name}': {module} has no '{attribute}'{self._hint(attribute, offered)}"
            ) from None


def _place(target: type) -> tuple[str, str]:
    return target.__module__, target.__qualname__


@lru_cache(maxsize=32)
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, set[str]]:
    """Read the metadata of every installed package, a tenth of a second, once for each group and search path."""
    # A set: an editable install and a wheel of the same package may declare the same target twice.
    found: dict[str, set[str]] = {}
    for point in metadata.entry_points(group=group):
        found.setdefault(point.name, set()).add(point.value)
    return found
