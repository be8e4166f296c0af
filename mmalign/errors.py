"""The error that means "your input is wrong", and the helper that finds what was probably meant.

Style of every message: what was given, what is allowed, the nearest match, the fix; one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong; the command line prints the message as one line and exits with code 2."""


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """Return the entry of `allowed` that `given` was most probably meant to be, or None if nothing is close.

    Close is a name of which what was given is a whole part ("dpo": "diffusion_dpo", not "ddpo"), or else a similar
    spelling in any case, or else a word that contains it.
    """
    by_lower = {word.lower(): word for word in allowed}
    matches = _with_part(given, by_lower)
    if len(matches) != 1:
        matches = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.6)
    if not matches and len(given) > 2:
        matches = sorted(word for word in by_lower if given.lower() in word)
    return by_lower[matches[0]] if matches else None


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest match, or an empty string: made to be appended to a message.

    Two or three names with a part that is just what was given are all named.
    """
    allowed = list(allowed)
    alike = _with_part(given, allowed)
    if 2 <= len(alike) <= 3:
        return f"; did you mean {' or '.join(map(repr, sorted(alike)))}?"
    match = nearest(given, allowed)
    return f"; did you mean '{match}'?" if match else ""


def _with_part(given: str, allowed: Iterable[str]) -> list[str]:
    """Return the other names of which what was given is a whole part, in any case."""
    part = given.lower()
    return [word for word in allowed if part != word.lower() and part in re.split(r"[^a-z0-9]+", word.lower())]
