"""Rows of tables that name or hold images: parquet files, JSON, JSONL, CSV and TSV, and data sets of the hub.

Only the small columns are read to index a source; images are read row by row later, so a million rows need a few
hundred megabytes, whatever the size of the images.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.files import exists
from mmalign.core.io.images import Media
from mmalign.core.io.parquet import (
    ForwardReader,
    is_text_column,
    iterate_columns,
    null_rows,
    open_parquet,
    read_metadata,
)
from mmalign.core.io.tables import json_lines, read_rows, read_text
from mmalign.data.readers.layouts import Layout

Choose = Callable[[Sequence[str], str, Mapping[str, Any] | None], Layout]
"""From the columns of a row, the place for messages and the row itself to its layout."""
Row = tuple[int, Layout, Mapping[str, Any]]
"""The number of a row, its layout and its small columns; an image that is known to be missing is None there."""
ANCESTORS = 4


class Rows(Protocol):
    """A readable table."""

    name: str
    metadata: dict[str, Any]
    first: int
    """How its first row is called where it has no id."""

    def read(self, choose: Choose) -> Iterator[Row]:
        """Yield every row in order, without touching images that the table holds."""
        ...

    def layout(self, row: int, choose: Choose) -> Layout:
        """Return the layout of a row."""
        ...

    def cell(self, row: int, column: str, side: int) -> Any:
        """Return a cell; rising row numbers are the cheap order, separately for each `side`."""
        ...

    def where(self, row: int) -> str:
        """Return how messages call a row."""
        ...

    def file(self, row: int) -> Path:
        """Return the file that holds a row, to which paths are relative."""
        ...


def as_media(value: object, folder: Path, where: str) -> Media:
    """Return an image cell as media: bytes, a path, or the {"bytes", "path"} of `datasets`' Image feature.

    Raises:
        UserError: it is none of them.
    """
    given = _bytes_or_path(value, where)
    return given if isinstance(given, bytes) else folder / given


def as_image(value: object, table: Path, where: str) -> Media:
    """Return an image cell as `as_media` does, and search a path where published sets have their images."""
    given = _bytes_or_path(value, where)
    return given if isinstance(given, bytes) else locate(table, given)


def _bytes_or_path(value: object, where: str) -> bytes | str:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) or (isinstance(value, str) and value):
        return value
    raise UserError(f"{where}: no image (found {type(value).__name__}, expected bytes or a path)")


def locate(table: Path, given: str) -> Path:
    """Return the file that a table names, relative to its folder; where there is none, where published sets have it.

    HPDv2's train.json names files that lie in train/ beside it. ImageRewardDB's images/train/train_1/train_1.json
    names files from the folder above images/. VideoFeedback gives links; the files of their names lie in videos/.
    """
    folder = table.parent
    above = list(folder.absolute().parents)[: ANCESTORS - 1]
    candidates = [
        folder / given,
        folder / table.stem / given,
        folder / "images" / given,
        *(folder / place / Path(urlsplit(given).path).name for place in ("videos", "") if "://" in given),
        folder / "videos" / given,
        *(up / given for up in above),
    ]
    return next((path for path in candidates if exists(path)), candidates[0])


class ParquetRows:
    """The rows of one or more parquet files, numbered through all of them."""

    first = 0

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        """Open the files; no row is read."""
        self.name, self._files = name, list(files)
        self.metadata: dict[str, Any] = read_metadata(files[0])
        schemas = [open_parquet(path).schema_arrow for path in files]
        self._columns = [schema.names for schema in schemas]
        self._kinds: list[dict[str, list[Any]]] = [
            {name: [] for name in schema.names if _is_list(schema, name)} for schema in schemas
        ]
        self._starts = [0]
        for path in files:
            self._starts.append(self._starts[-1] + open_parquet(path).metadata.num_rows)
        self._readers: dict[int, tuple[int, str, ForwardReader]] = {}

    def read(self, choose: Choose) -> Iterator[Row]:
        """Yield the small columns of every row, paths of images among them."""
        for path, start in zip(self._files, self._starts, strict=False):
            layout, schema = self.layout(start, choose), open_parquet(path).schema_arrow
            paths = [name for name in layout.images if is_text_column(schema.field(name).type)]
            holes = {name: null_rows(path, name) for name in layout.images if name not in paths}
            number = start
            for batch in iterate_columns(path, list(dict.fromkeys([*layout.small, *paths]))):
                for row in batch.to_pylist():
                    lacking = {name: None for name, rows in holes.items() if number - start in rows}
                    yield number, layout, row | lacking
                    number += 1

    def layout(self, row: int, choose: Choose) -> Layout:
        """Return the layout of the file that holds a row."""
        index = self._index(row)
        return choose(self._columns[index], str(self._files[index]), self._kinds[index])

    def cell(self, row: int, column: str, side: int) -> Any:
        """Return a cell by the reader of its side."""
        index = self._index(row)
        opened = self._readers.get(side)
        if opened is None or opened[:2] != (index, column):
            opened = self._readers[side] = index, column, ForwardReader(self._files[index], [column])
        return opened[2].row(row - self._starts[index])[column]

    def where(self, row: int) -> str:
        """Return the file and the row in it."""
        index = self._index(row)
        return f"{self._files[index]}: row {row - self._starts[index]}"

    def file(self, row: int) -> Path:
        """Return the file that holds a row."""
        return self._files[self._index(row)]

    def _index(self, row: int) -> int:
        return bisect.bisect_right(self._starts, row, hi=len(self._files)) - 1


def _is_list(schema: pa.Schema, name: str) -> bool:
    """Tell whether a column holds lists; one whose name repeats is refused with the layout."""
    kinds = [schema.field(index).type for index in schema.get_all_field_indices(name)]
    return any(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in kinds)


class RecordRows:
    """The records of a JSON, JSONL, CSV or TSV file, all in memory; each may have a layout of its own."""

    first = 1

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UserError: it is malformed.
        """
        self.name, self._path = str(path), path
        self.metadata: dict[str, Any] = {}
        self._records = list(_records(path))

    def read(self, choose: Choose) -> Iterator[Row]:
        """Yield the records."""
        for number, record in enumerate(self._records):
            yield number, self.layout(number, choose), record

    def layout(self, row: int, choose: Choose) -> Layout:
        """Return the layout of one record.

        Raises:
            UserError: it is no object.
        """
        record = self._records[row]
        if not isinstance(record, Mapping):
            raise UserError(f"{self.where(row)} is a {type(record).__name__}; expected an object")
        return choose(list(record), self.where(row), record)

    def cell(self, row: int, column: str, side: int) -> Any:
        """Return a cell; None where the record lacks it."""
        return self._records[row].get(column)

    def where(self, row: int) -> str:
        """Return the file and the record in it."""
        return f"{self._path}: record {row + self.first}"

    def file(self, row: int) -> Path:
        """Return the file."""
        return self._path


def _records(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from read_rows(path)
        return
    text = read_text(path)
    if suffix == ".json" and text.strip():
        try:
            loaded = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # several documents are JSONL under another name
                raise UserError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deep
            raise UserError(f"{path}: is not JSON ({error})") from None
        else:
            yield from loaded if isinstance(loaded, list) else [loaded]
            return
    yield from (value for _, value in json_lines(path, text.split("\n")))
