"""Directories of models without half-written parts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_parts(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty directory: when the block succeeds, its files move into `folder`, part by part.

    `last` is the part whose presence means that the others exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        for part in sorted(scratch.iterdir(), key=lambda part: (part.name == last, part.name)):
            target = folder / part.name
            if target.exists() and (target.is_dir() or part.is_dir()):  # files are replaced in one step, these are not
                os.replace(target, scratch / f"{target.name}.old")
            os.replace(part, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
