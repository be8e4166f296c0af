"""Parquet with images inside: read forwards through millions of rows in little memory, write atomically."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.core.errors import UserError
from mmalign.core.files import replacing

METADATA_KEY = b"mmalign"
INDEX_BATCH = 8192
IMAGE_BATCH = 64
ROWS_PER_GROUP = 256


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file without reading any row.

    Raises:
        UserError: the file is missing, empty or no parquet file, or has two columns of one name.
    """
    try:
        # Pre-buffering would hold whole column chunks, that is every image of a row group, in memory.
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{path}: two columns are called '{repeated}'; rename one")
    return file


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return mmalign's metadata of a file (rewards, model, settings); empty for other files.

    Raises:
        UserError: the file is damaged, or its metadata is.
    """
    raw = (open_parquet(Path(path)).schema_arrow.metadata or {}).get(METADATA_KEY)
    try:
        found = json.loads(raw) if raw else {}
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(
            f"{path}: its metadata '{METADATA_KEY.decode()}' is not JSON ({reason}); write it again"
        ) from None
    return found if isinstance(found, dict) else {}


def iterate_columns(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the small columns of a file batch by batch, never touching the others."""
    yield from _undamaged(path, open_parquet(path).iter_batches(batch_size=INDEX_BATCH, columns=list(columns)))


def _undamaged(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield batches; a damaged page is an error that names the file."""
    try:
        for batch in batches:
            batch.validate(full=True)  # text that is not UTF-8 too
            yield batch
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); fetch or write it again") from None


def is_text_column(kind: pa.DataType) -> bool:
    """Tell whether a column holds text, in any of Arrow's encodings."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def null_rows(path: Path, column: str) -> set[int]:
    """Return the rows without a value in a column of bytes, or of structs of them; reads only groups with some."""
    file = open_parquet(path)
    leaves = [index for index in range(len(file.schema)) if file.schema.column(index).path.split(".")[0] == column]
    found: set[int] = set()
    start = 0
    for group in range(file.metadata.num_row_groups):
        part = file.metadata.row_group(group)
        counts = [part.column(leaf).statistics for leaf in leaves]
        if all(count is None or not count.has_null_count or count.null_count for count in counts):
            batches = file.iter_batches(IMAGE_BATCH, row_groups=[group], columns=[column])
            found |= _null_rows(_undamaged(path, batches), start)
        start += part.num_rows
    return found


def empty_cells(cells: pa.Array) -> list[bool]:
    """Tell which cells hold nothing: null, or a struct whose fields all are."""
    empty: list[bool] = cells.is_null().to_pylist()
    if not pa.types.is_struct(cells.type):
        return empty
    inside = zip(*(part.is_null().to_pylist() for part in cells.flatten()), strict=True)
    return [whole or all(parts) for whole, parts in zip(empty, inside, strict=True)]


def _null_rows(batches: Iterator[pa.RecordBatch], start: int) -> set[int]:
    found = set()
    for batch in batches:
        found |= {start + row for row, null in enumerate(empty_cells(batch.column(0))) if null}
        start += batch.num_rows
    return found


class ForwardReader:
    """Random access to rows that is cheap as long as it mostly moves forwards; holds a few dozen rows at a time."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Open the file; `columns` are the ones that `row` returns."""
        self._path, self._file = path, open_parquet(path)
        self._columns = list(columns)
        groups = self._file.metadata
        sizes = (groups.row_group(index).num_rows for index in range(groups.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group = -1
        self._first = 0
        self._batch: pa.RecordBatch | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as plain Python values."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = bisect.bisect_right(self._starts, index) - 1
        if self._batch is None or group != self._group or index < self._first:
            batches = self._file.iter_batches(IMAGE_BATCH, row_groups=[group], columns=self._columns)
            self._batches = _undamaged(self._path, batches)
            self._group, self._first, self._batch = group, self._starts[group], next(self._batches)
        while index >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows
            self._batch = next(self._batches)
        return {name: self._batch.column(name)[index - self._first].as_py() for name in self._columns}


class RowWriter:
    """Collects rows and writes them as row groups; made by `atomic_parquet`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        """Write rows of `schema` through an open writer."""
        self._writer, self._schema = writer, schema
        self._rows: list[Mapping[str, Any]] = []
        self.count = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) >= ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows collected so far as one row group."""
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


@contextmanager
def atomic_parquet(path: Path, schema: pa.Schema, metadata: Mapping[str, Any]) -> Iterator[RowWriter]:
    """Write a file beside its final place and rename it on success; a failure leaves nothing behind."""
    described = schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
    # PNG and JPEG do not compress further; snappy on the text columns is cheap.
    with replacing(path) as aside, pq.ParquetWriter(aside, described, compression="snappy") as writer:
        rows = RowWriter(writer, described)
        yield rows
        rows.flush()
