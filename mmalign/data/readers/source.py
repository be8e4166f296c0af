"""The common form of all preference formats: candidates to filter, and the two images of a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media


class Candidate(NamedTuple):
    """One comparison as the source states it; the side with the larger label is preferred, equal labels are a tie.

    Missing labels and scores are NaN.
    """

    row: int
    prompt: str
    id: str
    label_0: float
    label_1: float
    score_0: float = math.nan
    score_1: float = math.nan


@runtime_checkable
class PairSource(Protocol):
    """A readable source of pairs."""

    name: str
    metadata: dict[str, Any]

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison in order, without touching the images."""
        ...

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both sides of a row, encoded; rising row numbers are the cheap order."""
        ...


def choose_caption_column(found: Sequence[str], asked: str, source: str) -> str:
    """Return the column that holds the prompt: the configured one, or for the default also "prompt".

    Raises:
        UserError: there is none; the columns found are listed.
    """
    for name in (asked, "prompt") if asked == "caption" else (asked,):
        if name in found:
            return name
    raise missing_columns(source, [asked], found, "; data.caption_column names the one that holds the prompt")
