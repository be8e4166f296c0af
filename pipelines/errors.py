"""Errors that a user can fix: one line with the given value, the allowed ones and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PipelineError(ValueError):
    """The input to a pipeline is wrong; the message is one line and names the fix."""


class MissingModelError(PipelineError, FileNotFoundError):
    """A model or adapter does not exist at the given place."""


class MissingDependencyError(PipelineError, ImportError):
    """A requested feature needs a missing package or device."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string when none is close."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return ``given`` if it is allowed, otherwise raise a `PipelineError` that lists the allowed names."""
    names = list(allowed)
    if given in names:
        return given
    raise PipelineError(f"{what} '{given}' is unknown; allowed: {', '.join(names)}.{nearest(given, names)}")
