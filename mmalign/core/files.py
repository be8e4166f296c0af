"""Atomic writing of files (written beside the target, renamed when complete), checks of paths, and visible files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from mmalign.core.errors import UserError, shorten

BESIDE_MEDIA = frozenset({".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".md", ".log"})
"""Suffixes of text that usually lies beside images and videos."""


MAX_NAME = 255
"""Bytes of one name in a path, the limit of nearly all file systems."""


def expand(path: str | Path) -> Path:
    """Return a path with `~` and `~name` replaced by that user's home; the text itself where there is no such user."""
    return Path(os.path.expanduser(path))


def exists(path: str | Path) -> bool:
    """Tell whether a path exists; text that can be no path (too long, with NUL) does not, where `Path` raises."""
    return os.path.exists(path)


def is_file(path: str | Path) -> bool:
    """Tell whether a path is a file, as `exists` does."""
    return os.path.isfile(path)


def is_dir(path: str | Path) -> bool:
    """Tell whether a path is a folder, as `exists` does."""
    return os.path.isdir(path)


def is_hidden(path: str | PurePath) -> bool:
    """Tell whether a name inside a folder or archive is hidden: `.x`, what macOS adds, or our unfinished output."""
    parts = PurePath(path).parts
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts) or any(
        part.endswith(".parts") for part in parts[:-1]
    )


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what a folder holds that is not hidden, sorted; `**/` in the pattern goes into folders, not links."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder)))


@dataclass
class LeftOut:
    """Counts of what is left out of folders: by suffix, broken links, linked folders, and pictures made by mmalign."""

    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path) -> None:
        """Count what `path` is; folders, and text that lies beside media, are not media left out."""
        if path.is_symlink() and is_dir(path):
            self.kinds["linked folders"] += 1
        elif path.is_symlink() and not exists(path):
            self.kinds["broken links"] += 1
        elif not is_dir(path) and path.suffix.lower() not in BESIDE_MEDIA:
            self.kinds[path.suffix.lower() or "without a suffix"] += 1

    def __str__(self) -> str:
        """Return "3 left out: 2 .heic, 1 broken links"; empty where nothing was."""
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.kinds.total()} left out: {listed}" if listed else ""


def check_output(path: Path, key: str = "--out", *, folder: bool = True) -> None:
    """Refuse an output path that cannot be written to, before the work starts; nothing is written.

    `key` is the option or key that the user set; `folder` says whether `path` is to be a folder or a file.

    Raises:
        UserError: a file where a folder is needed or the reverse, a path that leads through a file or has a name that
            no file system takes, no permission.
    """
    check_names(path, key)
    if os.path.isdir(path) and not folder:
        raise UserError(f"{key} {path}: is a folder; name a file, such as {path / 'NAME'}")
    holder = path if folder else path.parent
    while not os.path.lexists(holder):
        holder = holder.parent
    if not os.path.isdir(holder):
        where = "is a file" if holder == path else f"{holder} on the way there is a file"
        raise UserError(f"{key} {path}: {where}; name another folder")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise UserError(f"{key} {path}: {holder} is not writable; choose another path")


def check_names(path: Path, key: str = "--out") -> None:
    """Refuse a path with NUL in it or with a name of more than `MAX_NAME` bytes; `key` is the option or key.

    Raises:
        UserError: see above.
    """
    if "\0" in str(path):
        raise UserError(f"{key} {str(path)!r}: a path cannot hold the character NUL; choose another")
    # What is being written bears a longer name for a moment, see `replacing`.
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > MAX_NAME - len(f"..{os.getpid()}.tmp"):
        raise UserError(f"{key} {shorten(str(path))}: a name of {longest} bytes is too long; choose one below 200")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it if the block succeeds and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8; readers see either the old content or the new."""
    with replacing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
