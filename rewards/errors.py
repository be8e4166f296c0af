"""The error that this package raises for wrong input, and the nearest-match hint of its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RewardError(ValueError):
    """Wrong input to a reward: one line with what was given, what is allowed and how to fix it."""


def choices(given: str, allowed: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest allowed name, if any, and all allowed names.

    >>> choices("clop", ["clip", "aesthetic"])
    "did you mean 'clip'? allowed: aesthetic, clip"
    """
    words = sorted(set(allowed))
    hint = did_you_mean(given, words).removeprefix("; ")
    return f"{hint}{' ' if hint else ''}allowed: {', '.join(words) or '(none)'}"


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest allowed word, or an empty string: to be appended to a message."""
    near = difflib.get_close_matches(given, sorted(set(allowed)), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
