"""Tables that name media: JSONL, CSV, TSV, parquet, a prompt in each row; parquet may hold the media themselves."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.core.errors import UserError, shorten
from mmalign.core.io.columns import PROMPT_COLUMNS, missing_columns
from mmalign.core.io.items import Item, stamp_of
from mmalign.core.io.parquet import ForwardReader, is_text_column, iterate_columns, open_parquet

TABLE_SUFFIXES = frozenset({".jsonl", ".csv", ".tsv", ".parquet"})
_FILE_COLUMNS = ("file_name", "file", "path")


def file_columns(modality: str) -> tuple[str, ...]:
    """Return the columns that may name a medium, the most specific first."""
    return modality, f"{modality}_path", *_FILE_COLUMNS


def column(found: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the first of `names` that is among the columns found, in any case, as it is written there."""
    written = {name.lower(): name for name in found if isinstance(name, str)}
    return next((written[name] for name in names if name in written), None)


def prompt_column(found: Iterable[str]) -> str | None:
    """Return the column that holds the prompt, if there is one."""
    return column(found, PROMPT_COLUMNS)


def table_items(path: Path, modality: str) -> Iterator[Item]:
    """Yield one item a row, named `table#row`; paths are relative to the table.

    A row without a medium, or whose prompt is no text, is an item with a fault.

    Raises:
        UserError: the table is malformed, or has no column of media.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_items(path, modality)
        return
    table = Table(path)
    if table.columns:
        _media_column(path, table.columns, modality)
    for number, row in enumerate(table.rows(table.columns)):
        media_at, text_at = column(row, file_columns(modality)), prompt_column(row)
        given, prompt = (None if name is None else row[name] for name in (media_at, text_at))
        yield _path_item(path, number, given, prompt)


class Table:
    """The rows of a JSONL, CSV, TSV or parquet file; media inside parquet are only read on access."""

    def __init__(self, path: Path) -> None:
        """Find the columns: of rows that are objects, every key that occurs.

        Raises:
            UserError: the file is malformed.
        """
        self.path = path
        self._parquet = path.suffix.lower() == ".parquet"
        self._rows = [] if self._parquet else list(read_rows(path))
        keys = open_parquet(path).schema_arrow.names if self._parquet else (key for row in self._rows for key in row)
        self.columns: list[str] = list(dict.fromkeys(keys))

    def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Yield every row, with these columns at least where it has them."""
        if not self._parquet:
            yield from self._rows
        elif columns:
            for batch in iterate_columns(self.path, columns):
                yield from batch.to_pylist()

    def cells(self, columns: Sequence[str]) -> Callable[[int], Mapping[str, Any]]:
        """Return a function from a row's number to these columns; rising numbers are the cheap order."""
        return ForwardReader(self.path, columns).row if self._parquet else self._rows.__getitem__


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with a byte order mark or without.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the value of every line of JSONL that is not blank; `path` is for messages.

    Raises:
        UserError: a line is not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
                raise UserError(f"{path}: line {number} is not JSON ({getattr(error, 'msg', error)})") from None


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a JSONL, CSV or TSV file.

    Raises:
        UserError: the file is malformed; the line is named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _json_rows(path, file) if path.suffix.lower() == ".jsonl" else _csv_rows(path, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, row in json_lines(path, lines):
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is a {type(row).__name__}; expected an object")
        yield row


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    header: list[str] | None = None
    for line, record in csv_records(path, lines, "\t" if path.suffix.lower() == ".tsv" else ","):
        if header is None:
            header = record
            repeated = next((name for name in record if name.strip() and record.count(name) > 1), None)
            if repeated is not None:
                raise UserError(f"{path}: two columns are called '{repeated}'; rename one")
        elif len(record) != len(header):
            raise UserError(f"{path}: line {line} has not as many fields as the first line")
        else:
            yield dict(zip(header, record, strict=True))


def csv_records(path: Path, lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield the first line, from 1, and the fields of every record of CSV that is not blank; `path` is for messages.

    Quotation marks are read strictly: a stray one would swallow records, or vanish from a text.

    Raises:
        UserError: a stray or unclosed quotation mark, or a field of more than 131,072 characters.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        fix = "quote the whole field and double the marks inside it"
        raise UserError(f"{path}: the record that starts in line {line} is no CSV ({error}); {fix}") from None


def _media_column(path: Path, found: Iterable[str], modality: str) -> str:
    chosen = column(found, file_columns(modality))
    if chosen is None:
        raise missing_columns(str(path), [modality], found)
    return chosen


def _path_item(table: Path, number: int, given: Any, prompt: Any) -> Item:
    name = f"{table}#{number}"
    if not isinstance(given, str) or not given:
        return Item(name, b"", fault=f"expected the path of a file, found {shorten(repr(given))}")
    path = table.parent / given
    return _with_prompt(Item(name, path, None, str(path), stamp_of(path)), prompt)


def _with_prompt(item: Item, prompt: Any) -> Item:
    if prompt is not None and not isinstance(prompt, str):
        return replace(item, fault=f"the prompt is a {type(prompt).__name__}; expected text")
    return replace(item, prompt=prompt)


def _parquet_items(path: Path, modality: str) -> Iterator[Item]:
    """Yield the rows; media inside the file are read when their turn comes, by rising row numbers."""
    schema = open_parquet(path).schema_arrow
    media_at, text_at = _media_column(path, schema.names, modality), prompt_column(schema.names)
    small = [
        name
        for name in (text_at, media_at if is_text_column(schema.field(media_at).type) else None)
        if name is not None
    ]
    reader, stamp, number = ForwardReader(path, [media_at]), stamp_of(path), 0
    rows = iterate_columns(path, small) if small else iter(())
    counted = (row for batch in rows for row in batch.to_pylist()) if small else ({} for _ in range(len(reader)))
    for number, row in enumerate(counted):
        prompt = None if text_at is None else row[text_at]
        if media_at in row:
            yield _path_item(path, number, row[media_at], prompt)
            continue
        name = f"{path}#{number}"
        yield _with_prompt(Item(name, partial(_cell, reader, number, media_at, path), None, None, stamp), prompt)


def _cell(reader: ForwardReader, number: int, name: str, table: Path) -> bytes:
    """Return the bytes of a cell: themselves, or the {"bytes", "path"} of `datasets`' Image feature."""
    value = reader.row(number)[name]
    if isinstance(value, Mapping):
        inside, path = value.get("bytes"), value.get("path")
        value = inside if inside is not None or not path else (table.parent / path).read_bytes()
    if not isinstance(value, bytes):
        raise UserError(f"column '{name}' holds a {type(value).__name__}; expected bytes or a path")
    return value
