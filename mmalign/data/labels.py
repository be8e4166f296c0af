"""Single images that are good or bad for their caption, from a table of them or from any source of pairs.

A table is a parquet, JSONL, CSV or TSV file with an image (bytes or a path), a caption and a label in each row;
instead of a label, or besides it, `caption_rejected` may hold a caption that does not fit the image. Pairs give two
rows each: chosen is good, rejected is bad.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media
from mmalign.core.io.tables import TABLE_SUFFIXES, Table, column, file_columns
from mmalign.core.resources import find
from mmalign.data.pairs import PairTable, read_pairs
from mmalign.data.readers.layouts import ID_COLUMNS, holds_pairs
from mmalign.data.readers.rows import as_media
from mmalign.data.readers.source import check_unique, choose_caption_column, id_of

LABEL_COLUMN, REJECTED_COLUMN = "label", "caption_rejected"
_WORDS = {"good": True, "true": True, "1": True, "bad": False, "false": False, "0": False}


@dataclass(frozen=True)
class LabelRecord:
    """An image that is good or bad for `prompt`; `rejected_prompt` is a caption that does not fit it."""

    prompt: str
    image: Media
    id: str
    good: bool
    rejected_prompt: str | None = None
    fps: tuple[float, ...] = (math.nan,)
    """frames a second of a video, as the source states them"""


class _Row(NamedTuple):
    prompt: str
    id: str
    good: bool
    rejected_prompt: str | None = None


class _Labels(Protocol):
    """A readable source of labels."""

    name: str

    def rows(self) -> Iterator[_Row]:
        """Yield every row in order, without touching the images."""
        ...

    def image(self, row: int) -> Media:
        """Return the image of a row; rising row numbers are the cheap order."""
        ...

    def fps(self, row: int) -> float:
        """Return the frames a second that the source states of a row's video, NaN where it states none."""
        ...

    def first_frame(self, row: int) -> Media | None:
        """Return the image that a row's video starts from, None where the source does not give it."""
        ...


class LabelTable:
    """The labelled images of one source: a compact index in memory, the images in place."""

    def __init__(self, source: _Labels, limit: int | None = None, *, good_only: bool = False) -> None:
        """Index the source, or its good images alone; called by `read_labels`."""
        self.name = source.name
        self.ids: list[str] = []
        self._source = source
        self._prompt_of, self._rejected_of = array("l"), array("l")
        self._good, self._row_of = array("b"), array("l")
        seen: dict[str, int] = {}
        for number, row in enumerate(source.rows()):
            if limit is not None and len(self) >= limit:
                break
            if good_only and not row.good:
                continue
            self._row_of.append(number)
            self.ids.append(row.id)
            self._good.append(row.good)
            self._prompt_of.append(seen.setdefault(row.prompt, len(seen)))
            rejected = row.rejected_prompt
            self._rejected_of.append(-1 if rejected is None else seen.setdefault(rejected, len(seen)))
        self.prompts = list(seen)
        check_unique(self.ids, self.name)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._good)

    def __iter__(self) -> Iterator[LabelRecord]:
        """Yield every image in the order of the source."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> LabelRecord:
        """Return one image; it comes as bytes or as a path, not decoded."""
        rejected = self._rejected_of[index]
        return LabelRecord(
            prompt=self.prompts[self._prompt_of[index]],
            image=self._source.image(self._row_of[index]),
            id=self.ids[index],
            good=bool(self._good[index]),
            rejected_prompt=None if rejected < 0 else self.prompts[rejected],
            fps=(self._source.fps(self._row_of[index]),),
        )

    def first_frame(self, index: int) -> Media | None:
        """Return the image that a video starts from, None where the source does not give it."""
        return self._source.first_frame(self._row_of[index])

    @property
    def counts(self) -> str:
        """The numbers of good and bad images, and of rejected captions, in words."""
        good, rejected = sum(self._good), sum(index >= 0 for index in self._rejected_of)
        captions = f", {rejected} with a rejected caption" if rejected else ""
        return f"{len(self)} images, {good} good and {len(self) - good} bad{captions}"

    def prompt_index(self, index: int) -> int:
        """Return where the prompt of an image stands in `prompts`, which holds each prompt once."""
        return self._prompt_of[index]

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the prompt of an image and its rejected caption, if it has one."""
        places = (self._prompt_of[index], self._rejected_of[index])
        return tuple(self.prompts[place] for place in places if place >= 0)

    def rejected_indices(self) -> list[int]:
        """Return where the rejected caption of each image stands in `prompts`; -1: it has none."""
        return list(self._rejected_of)

    def labels(self) -> list[bool]:
        """Return for each image whether it is good."""
        return [bool(good) for good in self._good]


def read_labels(source: str, config: DataConfig, *, good_only: bool = False) -> LabelTable:
    """Return the labelled images of a table, or those of any source that `read_pairs` reads; no image is read yet.

    `config` gives `caption_column` and `limit`, and for pairs their filters. `good_only` leaves the bad images out;
    the chosen image of a pair then goes by the pair's own id.

    Raises:
        UserError: no such source, a missing column, a label that is neither good nor bad, or nothing is left.
    """
    table = LabelTable(_open(source, config, good_only), config.limit, good_only=good_only)
    if not len(table):
        raise UserError(f"{source}: holds no {'good' if good_only else 'labelled'} images")
    return table


def _open(source: str, config: DataConfig, good_only: bool) -> _Labels:
    suffix = Path(source).suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        return _pair_labels(source, config, good_only)
    table = Table(find(source))
    labelled = LABEL_COLUMN in table.columns or REJECTED_COLUMN in table.columns
    if not labelled and (suffix in (".parquet", ".jsonl") or holds_pairs(table.columns, config)):
        return _pair_labels(source, config, good_only)
    if config.columns is not None:
        raise UserError(f"{table.path}: a table of labelled images, and data.columns applies to pairs; remove it")
    return _TableLabels(table, _Columns(table.columns, config.caption_column, str(table.path)))


class _Columns:
    """Which columns of a table hold what."""

    def __init__(self, found: Sequence[str], caption: str, source: str) -> None:
        self.source = source
        self.caption = choose_caption_column(found, caption, source)
        image = column(found, ("jpg", *file_columns("image"), *file_columns("video")))
        if image is None:
            raise missing_columns(source, ["image"], found)
        self.image = image
        if LABEL_COLUMN not in found and REJECTED_COLUMN not in found:
            raise missing_columns(source, [LABEL_COLUMN], found, "; its values are good and bad")
        self.identifier = next((name for name in ID_COLUMNS if name in found), None)
        optional = (LABEL_COLUMN, REJECTED_COLUMN, self.identifier)
        self.small = [self.caption, *(name for name in optional if name is not None and name in found)]

    def row(self, number: int, record: Any) -> _Row:
        where, prompt = f"{self.source}: row {number}", record.get(self.caption)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where} has no text in column '{self.caption}' ({prompt!r})")
        rejected = record.get(REJECTED_COLUMN) or None
        given = record.get(LABEL_COLUMN)
        good = True if given is None and rejected is not None else _WORDS.get(_word(given))
        if good is None:
            raise UserError(f"{where}: label {given!r}; allowed: good, bad, true, false, 1, 0")
        identifier = record.get(self.identifier) if self.identifier else None
        return _Row(prompt, id_of(identifier, number), good, rejected)


def _word(label: object) -> str:
    word = str(label).strip().lower()
    try:  # 1.0 and the decimal or text "1.00" are 1
        return f"{float(word):g}"
    except ValueError:
        return word


class _TableLabels:
    def __init__(self, table: Table, columns: _Columns) -> None:
        self.name, self._table, self._columns = str(table.path), table, columns
        self._cells = table.cells([columns.image])

    def rows(self) -> Iterator[_Row]:
        return (self._columns.row(number, row) for number, row in enumerate(self._table.rows(self._columns.small)))

    def image(self, row: int) -> Media:
        cell = self._cells(row).get(self._columns.image)
        return as_media(cell, self._table.path.parent, f"{self.name}: row {row}, {self._columns.image}")

    def fps(self, row: int) -> float:
        return math.nan

    def first_frame(self, row: int) -> Media | None:
        return None


def _pair_labels(source: str, config: DataConfig, good_only: bool) -> _PairLabels:
    if config.ties == "keep":
        raise UserError("data.ties keep: an image of a pair without a winner is neither good nor bad; remove it")
    return _PairLabels(read_pairs(source, config), good_only)  # of n pairs come at least n images


class _PairLabels:
    """Row 2 i is the chosen image of pair i, row 2 i + 1 the rejected one; with `chosen_only` row i the chosen one."""

    def __init__(self, table: PairTable, chosen_only: bool) -> None:
        self.name, self._table, self._chosen_only = table.name, table, chosen_only

    def rows(self) -> Iterator[_Row]:
        for index, name in enumerate(self._table.ids):
            prompt = self._table.prompts[self._table.prompt_index(index)]
            if self._chosen_only:
                yield _Row(prompt, name, True)
            else:
                yield _Row(prompt, f"{name}/chosen", True)
                yield _Row(prompt, f"{name}/rejected", False)

    def image(self, row: int) -> Media:
        if self._chosen_only:
            return self._table[row].chosen
        record = self._table[row // 2]
        return record.rejected if row % 2 else record.chosen

    def fps(self, row: int) -> float:
        if self._chosen_only:
            return self._table.clip(row).fps[0]
        return self._table.clip(row // 2).fps[row % 2]

    def first_frame(self, row: int) -> Media | None:
        return self._table.first_frame(row if self._chosen_only else row // 2)
