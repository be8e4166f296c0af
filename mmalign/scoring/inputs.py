"""Find the items to score: folders, globs and files, tables that name media, webdataset tars.

Prompts come from a table's column, from `metadata.jsonl` or `metadata.csv` beside the files (as `mmalign generate` and
the image folders of `datasets` write it), from a `.txt` of the same name, or are the same for all.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmalign.core.errors import UserError
from mmalign.core.files import exists, visible
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.decode import SUFFIXES
from mmalign.core.io.items import Item, stamp_of
from mmalign.core.io.tables import TABLE_SUFFIXES, column, file_columns, prompt_column, read_rows, table_items
from mmalign.core.progress import note
from mmalign.core.resources import find
from mmalign.scoring.tars import is_tar, tar_items

METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass
class Inputs:
    """The items found, each name once, and counts of those left out."""

    items: list[Item] = field(default_factory=list)
    repeated: int = 0
    other_media: int = 0


def find_items(given: Sequence[str], modality: str, prompt: str | None = None) -> Inputs:
    """Return all items of the inputs, in their order; files of a folder in the order of their paths.

    modality: "image" or "video". prompt: replaces every other prompt.

    Raises:
        UserError: an input does not exist, holds nothing to score, or is malformed.
    """
    found, seen = Inputs(), set[str]()
    prompts = _Prompts()
    for text in given:
        before = len(found.items) + found.repeated
        for item in _from_input(text, modality, prompts, found):
            if item.name in seen:
                found.repeated += 1
                continue
            seen.add(item.name)
            found.items.append(item if prompt is None else replace(item, prompt=prompt))
        if len(found.items) + found.repeated == before:
            raise UserError(f"{text}: holds no {modality}s{_hint(text, modality)}")
    if found.repeated:
        note(f"{found.repeated} {modality}s are given more than once and scored once")
    if found.other_media:
        note(f"{found.other_media} files in the folders are no {modality}s by their suffix and are left out")
    return found


def _from_input(text: str, modality: str, prompts: _Prompts, found: Inputs) -> Iterator[Item]:
    if glob.has_magic(text) and not exists(text):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise UserError(f"{text}: matches no file")
        for match in matches:
            yield from _from_path(Path(match), modality, prompts, found)
    else:
        yield from _from_path(find(text), modality, prompts, found)


def _from_path(path: Path, modality: str, prompts: _Prompts, found: Inputs) -> Iterator[Item]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _from_folder(path, modality, prompts, found)
    elif is_tar(path):
        yield from tar_items(path, modality)
    elif suffix in TABLE_SUFFIXES:
        yield from table_items(path, modality)
    elif suffix in SUFFIXES[modality]:
        yield _file_item(path, prompts)
    else:
        known = ", ".join(sorted({*SUFFIXES[modality], *TABLE_SUFFIXES, ".tar"}))
        raise UserError(f"{path}: not known to hold {modality}s; give a folder, a glob, or one of {known}")


def _from_folder(folder: Path, modality: str, prompts: _Prompts, found: Inputs) -> Iterator[Item]:
    other = next(suffixes for name, suffixes in SUFFIXES.items() if name != modality)
    for path in visible(folder, "**/*"):
        if not path.is_file():
            continue
        if path.suffix.lower() in SUFFIXES[modality]:
            yield _file_item(path, prompts)
        elif path.suffix.lower() in other:
            found.other_media += 1


def _file_item(path: Path, prompts: _Prompts) -> Item:
    return Item(str(path), path, prompts.of(path), str(path), stamp_of(path))


class _Prompts:
    """Prompts beside the files; every folder's metadata is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str]] = {}

    def of(self, path: Path) -> str | None:
        """Return the prompt of a file, or None where there is none."""
        if path.parent not in self._folders:
            self._folders[path.parent] = _read_metadata(path.parent)
        listed = self._folders[path.parent].get(path.name)
        return listed if listed is not None else _read_sidecar(path.with_suffix(".txt"))


def _read_metadata(folder: Path) -> dict[str, str]:
    for name in METADATA_FILES:
        listing = folder / name
        if not listing.is_file():
            continue
        prompts: dict[str, str] = {}
        for number, row in enumerate(read_rows(listing)):
            file_at = column(row, file_columns("image") + file_columns("video"))
            text_at = prompt_column(row)
            if file_at is None or text_at is None:
                wanted = "file" if file_at is None else "prompt"
                raise missing_columns(f"{listing}: record {number}", [wanted], row)
            if isinstance(row[text_at], str):
                prompts[str(row[file_at])] = row[text_at]
        return prompts
    return {}


def _read_sidecar(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, and so no prompt") from None


def _hint(text: str, modality: str) -> str:
    """Return a hint at other files that could be scored in a folder without media."""
    folder = Path(text)
    if not folder.is_dir():
        return ""
    tables = [path for path in visible(folder, "**/*") if path.suffix.lower() in TABLE_SUFFIXES or is_tar(path)]
    named = [path for path in tables if path.name not in METADATA_FILES]
    return f"; did you mean '{named[0]}'?" if named else f" ({', '.join(sorted(SUFFIXES[modality]))})"
