"""The error that means "your input is wrong", and the helper that finds what was probably meant.

Style of every message: what was given, what is allowed, the nearest match, the fix; one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong; the command line prints the message as one line and exits with code 2."""


class MissingPath(UserError):
    """A file or folder that the user names is not there; `path` is it, as given."""

    def __init__(self, path: object, hint: str) -> None:
        """Say that `path` does not exist, and `hint` at what was meant."""
        super().__init__(f"{path}: no such file or directory{hint}")
        self.path = str(path)


class TrainingDiverged(RuntimeError):
    """What a run computes has stopped to mean anything; nothing was saved after it."""


def close_to(given: str, allowed: Iterable[str]) -> list[str]:
    """Return the entries of `allowed` that `given` was most probably meant to be, none if nothing is close.

    They are the names of which what was given is a whole part ("dpo": "diffusion_dpo", not "ddpo"); or else the most
    similar spelling in any case, exchanged letters before others; or else the first word that contains it.
    """
    by_lower = {word.lower(): word for word in allowed}
    lower = given.lower()
    whole = [word for word in by_lower if lower in re.split(r"[^a-z0-9]+", word) and lower != word]
    if whole:
        return [by_lower[word] for word in whole]
    similar = difflib.get_close_matches(lower, by_lower, n=3, cutoff=0.6)
    similar.sort(key=lambda word: sorted(word) != sorted(lower))
    inside = sorted(word for word in by_lower if lower in word) if len(given) > 2 else []
    return [by_lower[word] for word in (similar or inside)[:1]]


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """Return the first entry of `close_to`, or None if nothing is close."""
    return next(iter(close_to(given, allowed)), None)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x' or 'y'?" for what is close, or an empty string: made to be appended to a message."""
    matches = close_to(given, allowed)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint was saved."""
