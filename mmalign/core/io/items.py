"""Items to score: one image or video with its prompt, known before its bytes are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 4 << 30
"""A member of an archive that claims to be larger counts as damaged."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes inside a file, such as a member of an uncompressed tar."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            OSError: the file ends before, or the size cannot be true.
        """
        if self.size > MAX_BYTES:
            raise OSError(f"claims to hold {self.size} bytes")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of {self.size} bytes")
        return data


Media = bytes | Path | Slice | Callable[[], bytes]
"""The place of an image or video. A callable is called in the order of the items, from one thread."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video.

    name: its identifier, also in messages: a path, `table.csv#3`, `shard.tar/0001.jpg`. path: the file
    as given, where there is one. stamp: size and time of the file that holds it; a changed one makes its scores stale.
    extra: any value that the caller wants back with the score. fault: why a row that names the item cannot be scored.
    """

    name: str
    media: Media
    prompt: str | None = None
    path: str | None = None
    stamp: str = ""
    extra: Any = None
    fault: str = ""


def stamp_of(path: Path) -> str:
    """Return size and modification time of a file as text; empty where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
