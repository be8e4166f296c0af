"""The scores on disk: parquet, CSV or JSONL, with the rewards that made them; parts until all are there.

Columns: id (the item's identifier), path (its file, where there is one), prompt, one column a reward, `total`
where rewards have weights, error (the reason for a missing score), stamp (size and time of the file scored). Parquet
holds the
rewards in its metadata under `mmalign`, as JSON; beside a CSV or JSONL file lies FILE.meta.json with the same.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.files import replacing, write_atomically
from mmalign.core.io.items import Item
from mmalign.core.io.parquet import atomic_parquet, iterate_columns, read_metadata

FORMATS = (".parquet", ".csv", ".jsonl")
PART_ROWS = 4096
PART_SECONDS = 20.0


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
            [(name, pa.string()) for name in ("id", "path", "prompt")]
            + [(name, pa.float64()) for name in self.columns]
            + [(name, pa.string()) for name in ("error", "stamp")]
        )
        self._rows: dict[str, Row] = {}
        self._new: list[Row] = []
        self._written = time.monotonic()
        for path in ([out] if out.is_file() else []) + sorted(self.parts.glob("*.parquet")):
            self._check(path)
            self._rows.update((row.id, row) for row in self._read(path))

    def check_items(self, items: Iterable[Item]) -> None:
        """Refuse to drop scores of items that are not among these.

        Raises:
            UserError: there are some.
        """
        others = self._rows.keys() - {item.name for item in items}
        if others:
            held = " and ".join(str(path) for path in (self.out, self.parts) if path.exists())
            raise UserError(
                f"{held}: {len(others)} items scored there are not among the inputs (such as {min(others)}); "
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
            self._write_parquet(self.parts / f"{max(taken, default=-1) + 1:06d}.parquet", self._new)
        self._new, self._written = [], time.monotonic()

    def finish(self, items: Sequence[Item]) -> list[Row]:
        """Write the rows of `items`, in their order, as the finished file, and remove the parts."""
        rows = [self._rows[item.name] for item in items]
        if self.out.suffix == ".parquet":
            self._write_parquet(self.out, rows)
        else:
            write_atomically(_sidecar(self.out), json.dumps(self.metadata, indent=2, ensure_ascii=False) + "\n")
            self._write_text(rows)
        if self.parts.is_dir():
            shutil.rmtree(self.parts)
        return rows

    def _check(self, path: Path) -> None:
        found = _read_metadata(path)
        if "rewards" not in found or "settings" not in found:
            raise UserError(f"{path}: was not written by `mmalign score`; choose another --out")
        before, now = _described(found), _described(self.metadata)
        different = [
            f"{key} {_short(before.get(key))} -> {_short(now.get(key))}"
            for key in [*now, *(key for key in before if key not in now)]
            if before.get(key) != now.get(key)
        ]
        if different:
            raise UserError(
                f"{path} holds scores made with other settings ({'; '.join(different[:3])}); choose another --out, "
                "or remove it"
            )

    def _read(self, path: Path) -> Iterator[Row]:
        if path.suffix == ".parquet":
            for batch in iterate_columns(path, self._schema.names):
                yield from map(self._row, batch.to_pylist())
            return
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                records = map(json.loads, lines) if path.suffix == ".jsonl" else csv.DictReader(lines)
                yield from map(self._row, records)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it, or choose another --out") from None

    def _row(self, record: Mapping[str, Any]) -> Row:
        numbers = (record[name] for name in self.columns)
        scores = tuple(math.nan if value in (None, "") else float(value) for value in numbers)
        texts = {name: record[name] or None for name in ("path", "prompt")}
        return Row(record["id"], texts["path"], texts["prompt"], scores, record["error"] or "", record["stamp"] or "")

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
                writer = csv.DictWriter(file, self._schema.names)
                writer.writeheader()
                writer.writerows(self._records(rows))


def check_format(out: Path) -> None:
    """Refuse an output file of unknown format.

    Raises:
        UserError: the suffix is none of `FORMATS`, or the path is a folder.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: unknown suffix; use one of {', '.join(FORMATS)}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.meta.json")


def _read_metadata(path: Path) -> dict[str, Any]:
    if path.suffix == ".parquet":
        return read_metadata(path)
    try:
        metadata = json.loads(_sidecar(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
