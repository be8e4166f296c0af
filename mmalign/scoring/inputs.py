"""Find the items to score: folders, globs and files, tables that name media, webdataset tars.

Prompts come from a table's column, from `metadata.jsonl` or `metadata.csv` beside the files (as `mmalign generate` and
the image folders of `datasets` write it), from a `.txt` or `.caption` of the same name, or are the same for all.
"""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmalign.core.errors import UserError
from mmalign.core.files import LeftOut, exists, is_file, visible
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.decode import SUFFIXES
from mmalign.core.io.items import Item, stamp_of
from mmalign.core.io.sidecars import prompt_beside
from mmalign.core.io.tables import TABLE_SUFFIXES, column, file_columns, prompt_column, read_rows, table_items
from mmalign.core.io.tars import is_tar, tar_items
from mmalign.core.progress import note
from mmalign.core.resources import find

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
OWN_GRID = "grid.png"
"""The overview that `mmalign generate --grid` writes beside its images, and does not list."""


@dataclass
class Inputs:
    """The items found, each name once, and counts of those left out."""

    items: list[Item] = field(default_factory=list)
    repeated: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def leaves_out_grid(self, path: Path, prompts: _Prompts) -> bool:
        """Tell whether a file is the overview of generated images, which is none of them; it is counted then."""
        own = path.name == OWN_GRID and prompts.lists_others(path)
        self.left_out.kinds.update([f"{OWN_GRID} of mmalign generate"] * own)
        return own


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
    if found.left_out.kinds:
        note(f"{len(found.items)} {modality}s read, {found.left_out}")
    return found


def _from_input(text: str, modality: str, prompts: _Prompts, found: Inputs) -> Iterator[Item]:
    if glob.has_magic(text) and not exists(text):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise UserError(f"{text}: matches no file")
        for match in map(Path, matches):
            if not found.leaves_out_grid(match, prompts):
                yield from _from_path(match, modality, prompts, found)
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
    prompts.reach(folder)
    for path in visible(folder, "**/*"):
        if not is_file(path) or path.suffix.lower() not in SUFFIXES[modality]:
            found.left_out.add(path)
        elif not found.leaves_out_grid(path, prompts):
            yield _file_item(path, prompts)


def _file_item(path: Path, prompts: _Prompts) -> Item:
    return Item(str(path), path, prompts.of(path), str(path), stamp_of(path))


class _Prompts:
    """Prompts beside the files; every folder's metadata is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str | None]] = {}
        self._reached: set[Path] = set()

    def reach(self, folder: Path) -> None:
        """Search for metadata of files below `folder` up to it."""
        self._reached.add(folder)

    def of(self, path: Path) -> str | None:
        """Return the prompt of a file, or None where there is none: of the nearest metadata, else of its sidecar."""
        folders = [path.parent]
        within = next((parent for parent in path.parents if parent in self._reached), path.parent)
        while folders[-1] != within:
            folders.append(folders[-1].parent)
        for folder in folders:
            listed = self._listed(folder).get(path.relative_to(folder).as_posix())
            if listed is not None:
                return listed
        return prompt_beside(path)

    def lists_others(self, path: Path) -> bool:
        """Tell whether the metadata beside a file lists other files and not this one."""
        listed = self._listed(path.parent)
        return bool(listed) and path.name not in listed

    def _listed(self, folder: Path) -> dict[str, str | None]:
        if folder not in self._folders:
            self._folders[folder] = _read_metadata(folder)
        return self._folders[folder]


def _read_metadata(folder: Path) -> dict[str, str | None]:
    """Return the files that a folder's metadata lists, relative to it, with their prompts where it has some."""
    for name in METADATA_FILES:
        listing = folder / name
        if not is_file(listing):
            continue
        prompts: dict[str, str | None] = {}
        for number, row in enumerate(read_rows(listing)):
            file_at, text_at = column(row, file_columns("image") + file_columns("video")), prompt_column(row)
            if file_at is None:
                raise missing_columns(f"{listing}: record {number}", ["file"], row)
            file = posixpath.normpath(str(row[file_at]))
            text = row[text_at] if text_at is not None and isinstance(row[text_at], str) else None
            if prompts.setdefault(file, text) != text:
                raise UserError(f"{listing}: record {number}: '{file}' has another prompt before; keep one")
        return prompts
    return {}


def _hint(text: str, modality: str) -> str:
    """Return a hint at other files that could be scored in a folder without media."""
    folder = Path(text)
    if not folder.is_dir():
        return ""
    tables = [path for path in visible(folder, "**/*") if path.suffix.lower() in TABLE_SUFFIXES or is_tar(path)]
    named = [path for path in tables if path.name not in METADATA_FILES]
    return f"; did you mean '{named[0]}'?" if named else f" ({', '.join(sorted(SUFFIXES[modality]))})"
