"""Data sets of the Hugging Face Hub, whole or streamed, and folders that `datasets` saved.

A hub id is `organisation/name[@revision][:[config/]split]`: `yuvalkirstain/pickapic_v2`, `org/name@v1.0:validation`,
`org/name:1k/train[:1000]`. The split is one of `datasets`, with a slice if wanted; without one it is train.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mmalign.core.errors import UserError, shorten
from mmalign.core.io.parquet import empty_cells
from mmalign.data.readers.layouts import Layout
from mmalign.data.readers.rows import Choose, Row

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::(?:([^/:\[\]]+)/)?([\w.+-]+(?:\[[^\]]*\])?))?")
_SLICE = re.compile(r"(.*)\[(\d*):(\d*)\]")
BATCH = 1024


class HubId(NamedTuple):
    """The parts of a hub id; None where they are not given."""

    path: str
    revision: str | None
    config: str | None
    split: str


def read_hub_id(text: str) -> HubId | None:
    """Return the parts of a hub id, None if text has not the form of one."""
    found = _HUB_ID.fullmatch(text)
    return None if found is None else HubId(found[1], found[2], found[3], found[4] or "train")


class HubRows:
    """The rows of a `datasets` data set."""

    first = 0

    def __init__(self, name: str, dataset: Any) -> None:
        """Take a `datasets.Dataset`, or an `IterableDataset` whose rows are read again for every pass."""
        from datasets import IterableDataset

        self.name = name
        self.metadata: dict[str, Any] = {}
        self._data = _undecoded(dataset)
        self._streamed = isinstance(dataset, IterableDataset)
        self._columns = list(self._data.column_names or next(iter(self._data), {}))
        self._sides: dict[tuple[int, str], _Forward] = {}

    def read(self, choose: Choose) -> Iterator[Row]:
        """Yield the small columns, with the images where they are paths or missing."""
        layout = self.layout(0, choose)
        if self._streamed:
            yield from ((number, layout, row) for number, row in enumerate(self._data))
            return
        images = [name for name in layout.images if name not in layout.small]
        number = 0
        for table in self._data.select_columns([*layout.small, *images]).with_format("arrow").iter(batch_size=BATCH):
            holes = {name: empty_cells(table.column(name).combine_chunks()) for name in images}
            for offset, row in enumerate(table.select(layout.small).to_pylist()):
                yield number, layout, row | {name: None for name, null in holes.items() if null[offset]}
                number += 1

    def layout(self, row: int, choose: Choose) -> Layout:
        """Return the layout of all rows."""
        from datasets import List

        features = (self._data.features or {}).items()
        return choose(self._columns, self.name, {name: [] for name, kind in features if isinstance(kind, List)})

    def cell(self, row: int, column: str, side: int) -> Any:
        """Return a cell; a stream is read forwards, and from the start again for an earlier row."""
        if not self._streamed:
            return self._data.select_columns([column])[row][column]
        reader = self._sides.setdefault((side, column), _Forward(self._data, column))
        return reader.cell(row)

    def where(self, row: int) -> str:
        """Return the data set and the row."""
        return f"{self.name}: row {row}"

    def file(self, row: int) -> Path:
        """Return a file in the working directory, to which paths in a data set are relative."""
        return Path("data")


class _Forward:
    """One column of a stream."""

    def __init__(self, data: Any, column: str) -> None:
        self._data, self._column = data, column
        self._next, self._last, self._rows = 0, None, iter(())

    def cell(self, row: int) -> Any:
        if row == self._next - 1:
            return self._last
        if row < self._next or not self._next:
            self._next, self._rows = 0, iter(self._data)
        self._last = next(islice(self._rows, row - self._next, None))[self._column]
        self._next = row + 1
        return self._last


def _undecoded(dataset: Any) -> Any:
    """Return a data set whose images come as bytes or paths."""
    from datasets import Image, List

    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset


def load_hub_rows(identifier: str, *, streaming: bool = False) -> HubRows:
    """Return the rows of a hub data set; see the module for what an identifier holds.

    Raises:
        UserError: it has not the form of a hub id, or cannot be loaded; the reason is given.
    """
    from datasets import load_dataset

    found = read_hub_id(identifier)
    given = found or HubId(*identifier.partition(":")[:1], None, None, identifier.partition(":")[2] or "train")
    split, start, stop = given.split, None, None
    sliced = _SLICE.fullmatch(split) if streaming else None
    if sliced:  # datasets slices no streams by the name of their split
        split, start, stop = sliced[1], *(int(end) if end else None for end in sliced.groups()[1:])
    try:
        options: Mapping[str, Any] = {"streaming": True} if streaming else {}
        dataset = load_dataset(given.path, given.config, split=split, revision=given.revision, **options)
        if sliced:
            dataset = dataset.skip(start or 0)
            dataset = dataset if stop is None else dataset.take(max(0, stop - (start or 0)))
    except Exception as error:  # datasets raises anything from OSError to its own types for a missing data set
        reason = shorten(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)
        raise UserError(
            f"data set '{identifier}' cannot be loaded ({reason}); give a table, a folder, or a hub id "
            "'organisation/name[@revision][:[config/]split]'"
        ) from None
    return HubRows(identifier, dataset)


def load_saved_rows(folder: Path) -> HubRows:
    """Return the rows of a folder that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        UserError: it holds several splits.
    """
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, dict):
        raise UserError(f"{folder}: holds the splits {', '.join(dataset)}; give the folder of one of them")
    return HubRows(str(folder), dataset)
