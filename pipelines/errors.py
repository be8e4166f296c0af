"""Errors that a user can mend: one line that says what was given, what is allowed and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PipelineError(ValueError):
    """The input to a pipeline is wrong; the message is one line and names the fix."""


class MissingModelError(PipelineError, FileNotFoundError):
    """A model or adapter is not where the user said."""


class MissingDependencyError(PipelineError, ImportError):
    """Something asked for needs a package or device that is not there."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string when none is close."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return ``given`` if it is allowed, otherwise raise a `PipelineError` that lists what is."""
    names = list(allowed)
    if given in names:
        return given
    raise PipelineError(f"{what} '{given}' is unknown; allowed: {', '.join(names)}.{nearest(given, names)}")
