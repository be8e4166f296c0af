"""Prompts in text files beside images: `NAME.txt` or `NAME.caption`, as tools that write captions name them."""

from __future__ import annotations

from pathlib import Path

from mmalign.core.errors import UserError
from mmalign.core.files import is_file

SIDECAR_SUFFIXES = (".txt", ".caption")


def sidecars(stem: Path) -> list[Path]:
    """Return the text files of a name without its suffix, those that exist.

    `stem` is the path of an image without its suffix; a name may hold further dots.
    """
    return [path for suffix in SIDECAR_SUFFIXES if is_file(path := stem.with_name(stem.name + suffix))]


def read_sidecar(path: Path) -> str:
    """Return the prompt in a text file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, and so no prompt") from None


def prompt_beside(image: Path) -> str | None:
    """Return the prompt beside an image, None where there is none.

    Raises:
        UserError: two files hold different prompts, or one is not UTF-8.
    """
    files = sidecars(image.with_suffix(""))
    texts = {read_sidecar(path) for path in files}
    if len(texts) > 1:
        raise UserError(f"{image}: {' and '.join(path.name for path in files)} hold different prompts; keep one")
    return texts.pop() if texts else None
