"""Pairs in a table of any layout: comparisons from its small columns, images from their cells when a pair is read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from numbers import Real
from typing import Any

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError, shorten
from mmalign.core.io.images import Media
from mmalign.data.readers.layouts import ID_COLUMNS, PREFERRED, Layout, Listed, Sides, choose_layout
from mmalign.data.readers.rows import Rows, as_image, as_media
from mmalign.data.readers.source import (
    NO_FACTS,
    Candidate,
    ClipFacts,
    flag_of,
    id_of,
    number_of,
    segments_of,
    weight_of,
)

__all__ = ["ID_COLUMNS", "TablePairs", "as_media"]

NO_PROMPT, NO_IMAGE, SINGLE = "without a prompt", "without an image", "without another image of their prompt"
_CATEGORICAL = ("unsafe type",)
"""The only dimension of VisionRewardDB-Image that is no rating."""

_Groups = dict[tuple[str, str], list[tuple[int, float, str]]]
"""(group, prompt) -> row, rating and category of each image."""


class TablePairs:
    """The comparisons of a table. Those of rated images stand where the first of their prompt stands."""

    def __init__(self, rows: Rows, config: DataConfig) -> None:
        """Take a table; nothing is read. `config` gives `caption_column` and `columns`."""
        self.name, self.metadata = rows.name, rows.metadata
        self._rows, self._config = rows, config
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._places: tuple[array[int], ...] = ()

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison.

        Raises:
            UserError: the columns are in no known layout, or a cell is not what it should be.
        """
        self._places = array("q"), array("q"), array("q"), array("q")
        groups: _Groups = {}
        gap = 0.0
        for number, layout, row in self._rows.read(self._choose):
            fault = self._fault(number, layout, row)
            if fault:
                yield Candidate(-1, "", "", math.nan, math.nan, fault=fault)
            elif isinstance(layout, Sides):
                yield self._from_sides(number, layout, row)
            elif isinstance(layout, Listed):
                yield from self._from_list(number, layout, row)
            else:
                rated = [_rating(row.get(name), f"{self._rows.where(number)}: {name}") for name in layout.ratings]
                merit = layout.sign * math.fsum(rated) / len(rated)
                key = str(row.get(layout.group, "") if layout.group else ""), row[layout.prompt]
                groups.setdefault(key, []).append((number, merit, _text(row, layout.category)))
                gap = layout.gap
        yield from self._from_groups(groups, gap)

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both images of a comparison."""
        first, second = (self._image(self._places[side][row], self._places[2 + side][row], side) for side in (0, 1))
        return first, second

    def first_frame(self, row: int) -> Media | None:
        """Return the image in the column `first_frame` of a pair, None where there is none, or each side has its own.

        A row with both sides may call it `image`.
        """
        first, second = self._places[0][row], self._places[1][row]
        given = self._first_frame(first, 2)
        return given if first == second or given == self._first_frame(second, 3) else None

    def _first_frame(self, row: int, reader: int) -> Media | None:
        column = self._rows.layout(row, self._choose).first_frame
        value = None if column is None else self._rows.cell(row, column, reader)
        if value in (None, ""):
            return None
        return as_image(value, self._rows.file(row), f"{self._rows.where(row)}, {column}")

    def _image(self, row: int, slot: int, side: int) -> Media:
        layout = self._rows.layout(row, self._choose)
        column = layout.images[slot] if isinstance(layout, Sides) else layout.images[0]
        value = self._rows.cell(row, column, side)
        if isinstance(layout, Listed):
            value = value[slot]
        return as_image(value, self._rows.file(row), f"{self._rows.where(row)}, {column}")

    def _choose(self, found: Sequence[str], where: str, sample: Mapping[str, Any] | None) -> Layout:
        key = (*found, *(name for name, value in (sample or {}).items() if isinstance(value, list)))
        if key not in self._layouts:
            self._layouts[key] = choose_layout(found, self._config, where, sample)
        return self._layouts[key]

    def _fault(self, number: int, layout: Layout, row: Mapping[str, Any]) -> str:
        """Return why a row is no comparison: a cell that it needs is empty.

        Raises:
            UserError: the prompt is no text, or an image of a record is neither a path nor bytes.
        """
        prompt = row.get(layout.prompt)
        if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
            return NO_PROMPT
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise UserError(f"{self._rows.where(number)}: the prompt is a {kind}; expected text in '{layout.prompt}'")
        for name in (name for name in layout.images if name in row):
            nothing = isinstance(row[name], Mapping) and not any(row[name].values())  # bytes and path of an image
            if row[name] is None or row[name] == "" or nothing:
                return NO_IMAGE
            if not isinstance(row[name], str | bytes | Mapping | list):
                given = shorten(repr(row[name]))
                raise UserError(
                    f"{self._rows.where(number)}: expected the path of an image in '{name}', found {given}"
                )
        return ""

    def _place(self, first: tuple[int, int], second: tuple[int, int]) -> int:
        for kept, value in zip(self._places, (first[0], second[0], first[1], second[1]), strict=True):
            kept.append(value)
        return len(self._places[0]) - 1

    def _from_sides(self, number: int, layout: Sides, row: Mapping[str, Any]) -> Candidate:
        where = self._rows.where(number)
        labels = [1.0, 0.0]
        if layout.labels is not None:
            labels = [number_of(row.get(name), f"{where}: {name}") for name in layout.labels]
        if layout.axis is not None:
            labels = list(_preferred(row.get(layout.axis), f"{where}: {layout.axis}"))
        if layout.has_label and flag_of(row.get(layout.has_label), f"{where}: {layout.has_label}") is False:
            labels = [math.nan, math.nan]
        scores = [number_of(row.get(name), f"{where}: {name}") for name in layout.scores or ()] or [math.nan, math.nan]
        identifier = id_of(row.get(layout.id) if layout.id else None, number + self._rows.first)
        place = self._place((number, 0), (number, 1))
        (label_0, label_1), (score_0, score_1), category = labels, scores, _text(row, layout.category)
        prompt, clip = row[layout.prompt], _clip(layout, row, where)
        return Candidate(place, prompt, identifier, label_0, label_1, score_0, score_1, category, clip=clip)

    def _from_list(self, number: int, layout: Listed, row: Mapping[str, Any]) -> Iterator[Candidate]:
        where, images, given = self._rows.where(number), row[layout.image_list], row.get(layout.ratings)
        merits = given if isinstance(given, list) else []
        if not isinstance(images, list) or len(images) != len(merits) or len(images) < 2:
            found = f"{shorten(repr(images))} and {shorten(repr(given))}"
            raise UserError(f"{where}: needs at least 2 images and a preference for each; found {found}")
        if not all(isinstance(merit, Real) for merit in merits):
            raise UserError(f"{where}: preferences and ranks are numbers; found {shorten(repr(merits))}")
        if not all(images):
            yield Candidate(-1, "", "", math.nan, math.nan, fault=NO_IMAGE)
            return
        ratings = [number_of(merit, f"{where}: {layout.ratings}") for merit in merits]
        identifier = id_of(row.get(layout.id) if layout.id else None, number + self._rows.first)
        for first, second in combinations(range(len(images)), 2):
            name = identifier if len(images) == 2 else f"{identifier}-{first}-{second}"
            label_0, label_1 = (layout.sign * ratings[slot] for slot in (first, second))
            place = self._place((number, first), (number, second))
            yield Candidate(place, row[layout.prompt], name, label_0, label_1, category=_text(row, layout.category))

    def _from_groups(self, groups: _Groups, gap: float) -> Iterator[Candidate]:
        taken: set[str] = set()
        for (group, prompt), members in groups.items():
            if len(members) == 1:
                yield Candidate(-1, "", "", math.nan, math.nan, fault=SINGLE)
            name = group if group and group not in taken else f"{group or 'row'}-{members[0][0]}"
            taken.add(name)
            for first, second in combinations(range(len(members)), 2):
                (row_0, merit_0, category), (row_1, merit_1, _) = members[first], members[second]
                if 0 < abs(merit_0 - merit_1) < gap:
                    yield Candidate(-1, "", "", math.nan, math.nan, fault=f"rated less than {gap:g} apart")
                    continue
                place = self._place((row_0, 0), (row_1, 0))
                yield Candidate(place, prompt, f"{name}-{first}-{second}", merit_0, merit_1, category=category)


def _preferred(value: object, where: str) -> tuple[float, float]:
    """Return the labels of a judgement A, B or same; NaN where there is none."""
    if value is None or value == "":
        return math.nan, math.nan
    if (word := str(value).strip().lower()) in PREFERRED:
        return PREFERRED[word]
    raise UserError(f"{where} is {shorten(repr(value))}; give A, B or same")


def _clip(layout: Sides, row: Mapping[str, Any], where: str) -> ClipFacts:
    """Return what a row states of its videos."""
    if layout.fps is None and layout.weight is None and layout.segments is None:
        return NO_FACTS
    first, second = (
        (number_of(row.get(name), f"{where}: {name}") for name in layout.fps) if layout.fps else NO_FACTS.fps
    )
    weight = weight_of(row.get(layout.weight), f"{where}: {layout.weight}") if layout.weight else math.nan
    segments = segments_of(row.get(layout.segments), f"{where}: {layout.segments}") if layout.segments else ()
    return ClipFacts((first, second), weight, segments)


def _rating(value: object, where: str) -> float:
    """Return a rating: a number, the mean of a list of them, or the sum of the dimensions of a struct."""
    if isinstance(value, list):
        numbers = [number_of(one, where) for one in value]
        return math.fsum(numbers) / len(numbers) if numbers else math.nan
    if isinstance(value, Mapping):
        rated = [one for name, one in value.items() if name not in _CATEGORICAL]
        whole = rated and all(isinstance(one, Real) for one in rated)
        return math.fsum(float(one) for one in rated) if whole else math.nan
    return number_of(value, where)


def _text(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column) if column else None
    return "" if value is None else str(value)
