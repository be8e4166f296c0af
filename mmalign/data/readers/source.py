"""The common form of all preference formats: candidates to filter, and the two images of a row."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mmalign.core.errors import UserError, shorten
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media


class Segment(NamedTuple):
    """A part of a pair of videos, from `start` to before `end` in seconds, in which one side is better.

    `label` is above 0 where the first, or chosen, side is better, below 0 where the other is, 0 for a tie.
    """

    start: float
    end: float
    label: float


class ClipFacts(NamedTuple):
    """What a source states of the videos of a comparison; NaN: nothing.

    `fps` are the frames a second of both sides, where the files do not state them or state them wrongly; `weight` is
    the weight of the pair in the loss.
    """

    fps: tuple[float, float] = (math.nan, math.nan)
    weight: float = math.nan
    segments: tuple[Segment, ...] = ()

    def swapped(self) -> ClipFacts:
        """Return the facts with the sides exchanged."""
        turned = tuple(one._replace(label=-one.label) for one in self.segments)
        return ClipFacts(self.fps[::-1], self.weight, turned)


NO_FACTS = ClipFacts()


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
    clip: ClipFacts = NO_FACTS


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

    def first_frame(self, row: int) -> Media | None:
        """Return the image that both videos of a row start from, None where the source does not give it."""
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


def weight_of(value: object, where: str) -> float:
    """Return the weight of a pair in the loss, NaN where there is none.

    Raises:
        UserError: it is no finite number of at least 0; `where` names the cell.
    """
    try:
        number = number_of(value, where)
    except UserError:
        number = math.inf
    if math.isnan(number) or 0 <= number < math.inf:
        return number
    raise UserError(
        f"{where} is {shorten(repr(value))}; give a weight in the loss, 0 or more; a column that means something else "
        "needs another name"
    )


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


def segments_of(value: object, where: str) -> tuple[Segment, ...]:
    """Return the segments of a table's cell: a list of {start, end, label}, or such a list as JSON text.

    A label is 1, 0 or -1, or chosen, tie or rejected.

    Raises:
        UserError: it is none; `where` names the cell.
    """
    if value is None or value == "" or value != value:
        return ()
    words = {"chosen": 1.0, "same": 0.0, "tie": 0.0, "rejected": -1.0}
    try:
        given: Any = json.loads(value) if isinstance(value, str) else value
        found = tuple(
            Segment(float(one["start"]), float(one["end"]), float(words.get(one["label"], one["label"])))
            for one in given
        )
    except (TypeError, KeyError, ValueError):
        found = (Segment(0.0, 0.0, 0.0),)
    if all(0 <= one.start < one.end and not math.isnan(one.label) for one in found):
        return found
    raise UserError(
        f"{where} is {shorten(repr(value))}; give a list of {{start, end, label}}, in seconds, label chosen, tie or "
        "rejected; a column that means something else needs another name"
    )


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
