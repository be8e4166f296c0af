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


def bytes_or_file(media: Media) -> bytes | Path:
    """Return the file of an image or video as it is, and the bytes of one that lies elsewhere.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(media, Slice):
        return media.read()
    return media if isinstance(media, bytes | Path) else media()


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

    def __post_init__(self) -> None:
        """Escape what cannot be written as UTF-8: names of files from other systems; such a prompt is a fault."""
        for key in ("name", "path"):
            given = getattr(self, key)
            if given is not None and not given.isascii():
                object.__setattr__(self, key, printable(given))
        if self.prompt is not None and not self.prompt.isascii() and self.prompt != printable(self.prompt):
            object.__setattr__(self, "fault", "the prompt is no text in UTF-8 (it holds half a character)")
            object.__setattr__(self, "prompt", None)


def printable(text: str) -> str:
    """Return text with what cannot be written as UTF-8 escaped: the byte E9 of a file's name as \\xe9."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character of UTF-16, which no file's name gives
        raw = text.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


def stamp_of(path: Path) -> str:
    """Return size and modification time of a file as text; empty where there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: text with NUL is no path
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
