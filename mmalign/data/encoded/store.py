"""Content-addressed rows of tensors on disk: safetensors shards, written once, memory-mapped afterwards."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmalign.core.files import replacing
from mmalign.core.hashing import content_key
from mmalign.core.progress import note

SHARD_ROWS = 1024
SHARD_BYTES = 256 * 2**20
MEMORY_LIMIT = 2 * 2**30


class TensorStore:
    """A folder of shards; a row is a set of named tensors under a key, and all rows have the same names and shapes.

    Appending is safe while others read or append: a shard is written aside, renamed and never changed. Rows that were
    added but not flushed are lost with the process; flushed rows are found again.
    """

    def __init__(self, folder: Path) -> None:
        """Read which keys the shards hold (their headers alone)."""
        self.folder = folder
        self._where: dict[str, tuple[Path, int]] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        for path in sorted(folder.glob("*.safetensors")):
            self._index(path)

    def __contains__(self, key: str) -> bool:
        """Tell whether a row is stored or about to be."""
        return key in self._where or key in self._pending

    def __len__(self) -> int:
        """Return the number of rows stored."""
        return len(self._where)

    def add(self, key: str, row: Mapping[str, Tensor]) -> None:
        """Append a row; full shards are written by themselves, the last one by `flush`."""
        self._pending[key] = {name: tensor.detach().cpu() for name, tensor in row.items()}
        self._pending_bytes += sum(tensor.nbytes for tensor in row.values())
        if len(self._pending) >= SHARD_ROWS or self._pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard.

        Raises:
            OSError: the shard cannot be written; a full disk is ENOSPC, whatever the writer makes of it.
        """
        if not self._pending:
            return
        keys, rows = list(self._pending), list(self._pending.values())
        path = self.folder / f"{content_key(*keys)}.safetensors"
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        try:
            with replacing(path) as aside:
                save_file(stacked, aside, metadata={"keys": json.dumps(keys)})
        except (OSError, SafetensorError) as error:
            raise _as_full_disk(error, self.folder) from error
        self._pending, self._pending_bytes = {}, 0
        self._where.update({key: (path, row) for row, key in enumerate(keys)})

    def value(self, key: str, name: str) -> Tensor:
        """Return one tensor of a row, added or stored, and read no other; KeyError if the row is neither."""
        if key in self._pending:
            return self._pending[key][name]
        path, number = self._where[key]
        with safe_open(path, framework="pt") as shard:
            found: Tensor = shard.get_slice(name)[number]
        return found

    def rows(self, keys: Sequence[str], memory_limit: int = MEMORY_LIMIT) -> Rows:
        """Return the rows of these keys, in their order; copied into memory if they take at most `memory_limit` bytes.

        Raises:
            KeyError: a key is not stored.
        """
        return Rows([self._where[key] for key in keys], memory_limit)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                keys = json.loads(shard.metadata()["keys"])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            note(f"cache: shard {path} is damaged ({str(error).splitlines()[0]}); its rows are encoded again")
            path.unlink(missing_ok=True)
            return
        self._where.update({key: (path, row) for row, key in enumerate(keys)})


class Rows:
    """Numbered rows of a store: `rows[tensor of numbers]` returns their tensors by name, stacked."""

    def __init__(self, places: Sequence[tuple[Path, int]], memory_limit: int) -> None:
        """Open the shards that hold the rows; made by `TensorStore.rows`."""
        paths = {path: index for index, path in enumerate(dict.fromkeys(path for path, _ in places))}
        self._shard_of = torch.tensor([paths[path] for path, _ in places], dtype=torch.long)
        self._row_of = torch.tensor([row for _, row in places], dtype=torch.long)
        self._shards = [_map_shard(path) for path in paths]
        self._memory: dict[str, Tensor] | None = None
        row_bytes = sum(tensor[:1].nbytes for tensor in self._shards[0].values()) if self._shards else 0
        self.in_memory = row_bytes * len(places) <= memory_limit
        if self.in_memory and places:
            self._memory = self._gather(torch.arange(len(places)))
            self._shards = []

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._row_of)

    def __getitem__(self, numbers: Int[Tensor, " count"]) -> dict[str, Tensor]:
        """Return the stacked tensors of these rows; the result may be written to."""
        if self._memory is not None:
            return {name: tensor[numbers] for name, tensor in self._memory.items()}
        return self._gather(numbers)

    def _gather(self, numbers: Int[Tensor, " count"]) -> dict[str, Tensor]:
        first = self._shards[0]
        result = {name: tensor.new_empty((len(numbers), *tensor.shape[1:])) for name, tensor in first.items()}
        shards, rows = self._shard_of[numbers], self._row_of[numbers]
        for index in shards.unique().tolist():
            here = (shards == index).nonzero().squeeze(1)
            for name, tensor in self._shards[index].items():
                result[name][here] = tensor[rows[here]]
        return result


def _as_full_disk(error: Exception, folder: Path) -> Exception:
    """Return the system's error for a full disk, naming the key that chose it; any other error as it is."""
    # The safetensors writer is native code and wraps the operating system's error in its own type, as text.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and not re.search(r"os error (28|122)\b|no space left|quota exceeded", str(error), re.IGNORECASE):
        return error
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder} (data.cache)")


def _map_shard(path: Path) -> dict[str, Tensor]:
    """Return a shard's tensors, backed by the file: pages are read when touched and dropped under memory pressure."""
    with safe_open(path, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (no mapping)
