"""The error for wrong input, and the functions that find the nearest allowed name.

Style of every message: what was given, what is allowed, the nearest match, the fix; one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_PATH = 255
"""Characters of a path in a message; a longer one is hardly a path."""


def shorten(text: str, limit: int = 60) -> str:
    """Return foreign text for a message: its first `limit` characters, and dots where it is longer."""
    return text if len(text) <= limit else text[:limit] + "..."


def plain(line: str) -> str:
    """Return a line for a terminal: control characters are escaped, and words that are hardly words are cut."""
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    return re.sub(rf"\S{{{LONGEST_PATH + 1},}}", lambda word: shorten(word[0]), shown)


class UserError(Exception):
    """The user's input is wrong; the command line prints the message without a traceback and exits with code 2."""


class MissingPath(UserError):
    """A file or folder that the user named does not exist; `path` is the path as given."""

    def __init__(self, path: object, hint: str) -> None:
        """Report that `path` does not exist; `hint` is appended to the message."""
        super().__init__(f"{plain(shorten(str(path), LONGEST_PATH))}: no such file or directory{hint}")
        self.path = str(path)


class TrainingDiverged(RuntimeError):
    """Training diverged: the loss, a gradient or the samples are not finite; nothing was saved afterwards."""


def close_to(given: str, allowed: Iterable[str]) -> list[str]:
    """Return the entries of `allowed` that are nearest to `given`; an empty list if nothing is close.

    They are the names that have `given` as a whole part ("dpo": "diffusion_dpo", not "ddpo"). If there are none, it
    is the most similar spelling (ignoring case, transposed letters first), or else the first word that contains it.
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
    """Return "; did you mean 'x' or 'y'?" with the nearest names, to append to a message; empty if none is close."""
    matches = close_to(given, allowed)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint was saved."""
