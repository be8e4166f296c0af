"""The common form of all preference formats: candidates to filter, and the two images of a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mmalign.core.errors import UserError, shorten
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media


class Candidate(NamedTuple):
    """One comparison as the source states it; the side with the larger label is preferred, equal labels are a tie.

    Missing labels and scores are NaN. `fault` says why a row is no comparison, such as "without a prompt".
    """

    row: int
    prompt: str
    id: str
    label_0: float
    label_1: float
    score_0: float = math.nan
    score_1: float = math.nan
    category: str = ""
    fault: str = ""


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


def number_of(value: object, where: str) -> float:
    """Return a number in a table, written as a number, a decimal or text; NaN where there is none.

    Raises:
        UserError: it is no number; `where` names the cell.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    if isinstance(value, int | float | Decimal | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{where} is {shorten(repr(value))}; give a number, not a {type(value).__name__}")


def flag_of(value: object, where: str) -> bool | None:
    """Return a yes or no in a table, written as true, false, 1 or 0 in any type; None where there is none.

    Raises:
        UserError: it is neither; `where` names the cell.
    """
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    number = number_of(value, where)
    if number in (0, 1):
        return bool(number)
    if math.isnan(number):
        return None
    raise UserError(f"{where} is {value!r}; give true, false, 1 or 0")


def id_of(value: object, row: int) -> str:
    """Return the id of a row: the value of its column, or the row's number where there is none."""
    return str(row if value is None or value == "" or value != value else value)


def check_unique(ids: Iterable[str], source: str) -> None:
    """Refuse ids that repeat: rows of one id would share noise, timestep and crop.

    Raises:
        UserError: one occurs twice.
    """
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(
            f"{source}: id '{shorten(repeated[0])}' occurs more than once, and ids seed what is drawn at random"
        )


def choose_caption_column(found: Sequence[str], asked: str, source: str) -> str:
    """Return the column that holds the prompt: the configured one, or for the default also "prompt".

    Raises:
        UserError: there is none; the columns found are listed.
    """
    for name in (asked, "prompt") if asked == "caption" else (asked,):
        if name in found:
            return name
    raise missing_columns(source, [asked], found, "; data.caption_column names the one that holds the prompt")
