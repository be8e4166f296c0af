"""The scores on disk: parquet, CSV or JSONL, with the rewards that made them; parts until all are there.

Columns: id (the item's identifier), path (its file, where there is one), prompt, one column a reward, `total`
where rewards have weights, error (the reason for a missing score), stamp (size and time of the file scored). Parquet
holds the rewards in its metadata under `mmalign`, as JSON; beside a CSV or JSONL file lies FILE.meta.json with the
same. In CSV, text that a spreadsheet would run as a formula has an apostrophe in front.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mmalign.core.errors import UserError, shorten
from mmalign.core.files import check_output, is_file, replacing, write_atomically
from mmalign.core.io.items import Item
from mmalign.core.io.parquet import atomic_parquet, iterate_columns, read_metadata
from mmalign.core.io.spreadsheet import unescape, write_csv
from mmalign.core.io.tables import read_rows
from mmalign.core.progress import note
from mmalign.scoring.choice import TEXT_COLUMNS

FORMATS = (".parquet", ".csv", ".jsonl")
PART_ROWS = 4096
PART_SECONDS = 20.0
_FIX = "; choose another --out, or remove it"


class Row(NamedTuple):
    """The stored values of one item; NaN where there is no score."""

    id: str
    path: str | None
    prompt: str | None
    scores: tuple[float, ...]
    error: str
    stamp: str

    @property
    def is_complete(self) -> bool:
        """Tell whether every reward gave a score."""
        return not self.error and all(map(math.isfinite, self.scores))


class Results:
    """The scores of one output file: the stored ones, and those being added."""

    def __init__(self, out: Path, columns: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Read the stored scores.

        Raises:
            UserError: the file was made by other rewards or settings, or is no file of scores.
        """
        self.out, self.columns, self.metadata = out, list(columns), dict(metadata)
        self.parts = out.with_name(f"{out.name}.parts")
        self._schema = pa.schema(
            [(name, pa.string()) for name in TEXT_COLUMNS[:3]]
            + [(name, pa.float64()) for name in self.columns]
            + [(name, pa.string()) for name in TEXT_COLUMNS[3:]]
        )
        self._rows: dict[str, Row] = {}
        self._new: list[Row] = []
        self._written = time.monotonic()
        self._own_parts: dict[Path, set[str]] = {}
        if is_file(out):
            self._check(out)
            self._rows.update((row.id, row) for row in self._read(out))
        self._finished = set(self._rows)
        self._read_parts()

    def check_items(self, items: Iterable[Item]) -> None:
        """Refuse to drop finished scores of items that are not among these; unfinished ones stay in their part.

        Raises:
            UserError: there are some.
        """
        others = self._finished - {item.name for item in items}
        if others:
            raise UserError(
                f"{self.out}: {len(others)} items scored there are not among the inputs (such as {min(others)}); "
                "choose another --out, or remove what is there"
            )

    def find(self, item: Item) -> Row | None:
        """Return the scores of an item, if all are there and neither its file nor its prompt has changed."""
        row = self._rows.get(item.name)
        current = row is not None and row.stamp == item.stamp and (row.prompt or "") == (item.prompt or "")
        return row if row is not None and current and row.is_complete else None

    def add(self, row: Row) -> None:
        """Keep the scores of an item; they are written some seconds later, or by `flush`."""
        self._rows[row.id] = row
        self._new.append(row)
        if len(self._new) >= PART_ROWS or time.monotonic() - self._written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the added scores as one more part."""
        if self._new:
            taken = [int(path.stem) for path in self.parts.glob("*.parquet") if path.stem.isdigit()]
            part = self.parts / f"{max(taken, default=-1) + 1:06d}.parquet"
            self._write_parquet(part, self._new)
            self._own_parts[part] = {row.id for row in self._new}
        self._new, self._written = [], time.monotonic()

    def finish(self, items: Sequence[Item]) -> list[Row]:
        """Write the rows of `items`, in their order, as the finished file, and remove its parts."""
        rows = [self._rows[item.name] for item in items]
        if self.out.suffix == ".parquet":
            self._write_parquet(self.out, rows)
        else:
            write_atomically(_sidecar(self.out), json.dumps(self.metadata, indent=2, ensure_ascii=False) + "\n")
            self._write_text(rows)
        names = {item.name for item in items}
        for part, held in self._own_parts.items():
            if held <= names:
                part.unlink(missing_ok=True)
        with suppress(OSError):  # parts of other settings or items are there
            self.parts.rmdir()
        return rows

    def _read_parts(self) -> None:
        """Read what an earlier run left unfinished; parts of other settings are left alone, and so do not block."""
        reason, left = "", 0
        for path in sorted(self.parts.glob("*.parquet")):
            try:
                self._check(path)
                rows = list(self._read(path))
            except UserError as error:
                reason, left = str(error).removesuffix(_FIX), left + 1
                continue
            self._rows.update((row.id, row) for row in rows)
            self._own_parts[path] = {row.id for row in rows}
        if left:
            note(f"{left} parts of an unfinished run are left out: {reason}; {self.parts} holds them still")

    def _check(self, path: Path) -> None:
        try:
            before = _described(_read_metadata(path))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: was not written by `mmalign score`; choose another --out") from None
        now = _described(self.metadata)
        different = [
            f"{key} {_short(before.get(key))} -> {_short(now.get(key))}"
            for key in [*now, *(key for key in before if key not in now)]
            if before.get(key) != now.get(key)
        ]
        if different:
            raise UserError(f"{path} holds scores made with other settings ({'; '.join(different[:3])}){_FIX}")

    def _read(self, path: Path) -> Iterator[Row]:
        records: Iterable[Mapping[str, Any]] = (
            (row for batch in iterate_columns(path, self._schema.names) for row in batch.to_pylist())
            if path.suffix == ".parquet"
            else read_rows(path)
        )
        text = unescape if path.suffix == ".csv" else str
        try:
            for record in records:
                numbers = (record[name] for name in self.columns)
                scores = tuple(math.nan if value in (None, "") else float(value) for value in numbers)
                id, place, prompt, error, stamp = (text(record[name] or "") for name in TEXT_COLUMNS)
                yield Row(id, place or None, prompt or None, scores, error, stamp)
        except (ValueError, KeyError, TypeError, OverflowError, OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged ({shorten(str(error))}){_FIX}") from None

    def _records(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        for row in rows:
            scores = (value if math.isfinite(value) else None for value in row.scores)
            yield {
                "id": row.id,
                "path": row.path,
                "prompt": row.prompt,
                **dict(zip(self.columns, scores, strict=True)),
                "error": row.error or None,
                "stamp": row.stamp,
            }

    def _write_parquet(self, path: Path, rows: Iterable[Row]) -> None:
        with atomic_parquet(path, self._schema, self.metadata) as writer:
            for record in self._records(rows):
                writer.add(record)

    def _write_text(self, rows: Iterable[Row]) -> None:
        with replacing(self.out) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            if self.out.suffix == ".jsonl":
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self._records(rows))
            else:
                write_csv(file, [self._schema.names])
                write_csv(file, (list(record.values()) for record in self._records(rows)))


def check_format(out: Path) -> None:
    """Refuse an output file of unknown format.

    Raises:
        UserError: the suffix is none of `FORMATS`, or the path cannot be written to.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: unknown suffix; use one of {', '.join(FORMATS)}")
    check_output(out, folder=False)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.meta.json")


def _read_metadata(path: Path) -> dict[str, Any]:
    if path.suffix == ".parquet":
        return read_metadata(path)
    try:
        metadata = json.loads(_sidecar(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _described(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that scores depend on, one entry each, as after a round trip through JSON."""
    plain = json.loads(json.dumps({"rewards": metadata["rewards"], "settings": metadata["settings"]}))
    described = {"rewards": [reward["label"] for reward in plain["rewards"]], **plain["settings"]}
    for reward in plain["rewards"]:
        described |= {f"{reward['label']}.{key}": reward.get(key) for key in ("name", "version", "weight")}
        described[f"{reward['label']}.options"] = reward.get("options")
        described[f"{reward['label']}: weights and code"] = reward.get("fingerprint")
    return described


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(part)[:8] if len(str(part)) == 32 else str(part) for part in value)
    return "none" if value is None else str(value)
