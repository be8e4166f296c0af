"""Pick-a-Pic columns (`caption, jpg_0, jpg_1, label_0, label_1`) in parquet files or a `datasets` data set.

Optional columns: `has_label`, `score_0`/`score_1`, and an id. Only the small columns are read to index a source;
images are read row by row later, so a million rows need a few hundred megabytes, whatever the size of the images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media
from mmalign.core.io.parquet import ForwardReader, iterate_columns, open_parquet, read_metadata
from mmalign.data.readers.source import Candidate, choose_caption_column, flag_of, id_of, number_of

IMAGE_COLUMNS = ("jpg_0", "jpg_1")
LABEL_COLUMNS = ("label_0", "label_1")
SCORE_COLUMNS = ("score_0", "score_1")
ID_COLUMNS = ("ranking_id", "pair_id", "uid", "id")


class _Columns:
    """Which columns of a source hold what."""

    def __init__(self, found: Sequence[str], caption: str, source: str) -> None:
        self.source = source
        self.caption = choose_caption_column(found, caption, source)
        lacking = [name for name in (*IMAGE_COLUMNS, *LABEL_COLUMNS) if name not in found]
        if lacking:
            raise missing_columns(source, lacking, found)
        optional = [name for name in ("has_label", *SCORE_COLUMNS) if name in found]
        self.identifier = next((name for name in ID_COLUMNS if name in found), None)
        self.small = [self.caption, *LABEL_COLUMNS, *optional, *([self.identifier] if self.identifier else [])]

    def candidates(self, batch: pa.RecordBatch, first_row: int) -> Iterator[Candidate]:
        values = {name: batch.column(name).to_pylist() for name in self.small}
        for offset in range(batch.num_rows):
            record = {name: column[offset] for name, column in values.items()}
            yield self._candidate(record, first_row + offset)

    def _candidate(self, record: Mapping[str, Any], row: int) -> Candidate:
        prompt = record[self.caption]
        if not isinstance(prompt, str):
            raise UserError(f"{self.source}: row {row} has no text in column '{self.caption}' ({prompt!r})")
        where = f"{self.source}: row {row}"
        labelled = flag_of(record.get("has_label"), f"{where}: has_label") is not False
        labels = [number_of(record[name], f"{where}: {name}") if labelled else math.nan for name in LABEL_COLUMNS]
        scores = [number_of(record.get(name), f"{where}: {name}") for name in SCORE_COLUMNS]
        identifier = record[self.identifier] if self.identifier else None
        return Candidate(row, prompt, id_of(identifier, row), *labels, *scores)


def as_media(value: object, folder: Path, where: str) -> Media:
    """Return an image cell as media: bytes, a path, or the {"bytes", "path"} of `datasets`' Image feature."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        return folder / value
    raise UserError(f"{where}: no image (found {type(value).__name__}, expected bytes or a path)")


class ParquetPairs:
    """Pairs in one or more parquet files, in the order of the files' names."""

    def __init__(self, name: str, files: Sequence[Path], caption: str) -> None:
        """Check the columns of every file; no row is read."""
        self.name = name
        self.metadata: dict[str, Any] = read_metadata(files[0])
        self._files = list(files)
        self._columns = [_Columns(open_parquet(path).schema_arrow.names, caption, str(path)) for path in files]
        self._starts = [0]
        for path in files:
            self._starts.append(self._starts[-1] + open_parquet(path).metadata.num_rows)
        self._open = -1
        self._reader: ForwardReader | None = None

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison; rows are numbered through all files."""
        for path, columns, start in zip(self._files, self._columns, self._starts, strict=False):
            for batch in iterate_columns(path, columns.small):
                yield from columns.candidates(batch, start)
                start += batch.num_rows

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both images of a row."""
        index = next(i for i, end in enumerate(self._starts[1:]) if row < end)
        if self._reader is None or index != self._open:
            self._reader, self._open = ForwardReader(self._files[index], IMAGE_COLUMNS), index
        local, path = row - self._starts[index], self._files[index]
        cells = self._reader.row(local)
        first, second = (as_media(cells[name], path.parent, f"{path}: row {local}, {name}") for name in IMAGE_COLUMNS)
        return first, second


class HubPairs:
    """Pairs in a `datasets` data set: a hub id with an optional `:split`, or a folder of `save_to_disk`."""

    def __init__(self, name: str, dataset: Any, caption: str) -> None:
        """Check the columns; `dataset` is a `datasets.Dataset`."""
        from datasets import Image

        self.name = name
        self.metadata: dict[str, Any] = {}
        self._columns = _Columns(dataset.column_names, caption, name)
        self._small = dataset.select_columns(self._columns.small).with_format("arrow")
        images = dataset.select_columns(list(IMAGE_COLUMNS))
        for column in IMAGE_COLUMNS:
            if isinstance(images.features[column], Image):
                images = images.cast_column(column, Image(decode=False))
        self._images = images

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison."""
        start = 0
        for table in self._small.iter(batch_size=8192):
            for batch in table.to_batches():
                yield from self._columns.candidates(batch, start)
                start += batch.num_rows

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both images of a row."""
        cells = self._images[row]
        first, second = (as_media(cells[name], Path(), f"{self.name}: row {row}, {name}") for name in IMAGE_COLUMNS)
        return first, second


def load_hub_pairs(identifier: str, caption: str) -> HubPairs:
    """Return the pairs of a hub data set, such as "yuvalkirstain/pickapic_v2" or "organisation/name:validation".

    Raises:
        UserError: it cannot be loaded (the reason is given), or lacks a column.
    """
    from datasets import load_dataset

    path, _, split = identifier.partition(":")
    try:
        dataset = load_dataset(path, split=split or "train")
    except Exception as error:  # datasets raises anything from OSError to its own types for a missing data set
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data set '{identifier}' cannot be loaded ({reason}); give a parquet, JSON or JSONL file, "
            "a folder, or a hub id 'organisation/name:split'"
        ) from None
    return HubPairs(identifier, dataset, caption)


def load_saved_pairs(folder: Path, caption: str) -> HubPairs:
    """Return the pairs of a folder that `datasets.Dataset.save_to_disk` wrote."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, dict):
        raise UserError(f"{folder}: holds the splits {', '.join(dataset)}; give the folder of one of them")
    return HubPairs(str(folder), dataset, caption)
