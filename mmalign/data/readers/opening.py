"""Find the reader for a source of pairs: by its suffix, the files in a folder, as a glob or list, or as a hub id."""

from __future__ import annotations

import glob
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.files import is_dir, visible
from mmalign.core.io.images import Media
from mmalign.core.io.tars import TAR_SUFFIXES, is_tar
from mmalign.core.progress import note
from mmalign.core.resources import find
from mmalign.data.readers.clip_folders import read_clip_folder
from mmalign.data.readers.hub import load_hub_rows, load_saved_rows, read_hub_id
from mmalign.data.readers.listed import paired_folders, read_folder_pairs, read_tar_pairs
from mmalign.data.readers.rows import ParquetRows, RecordRows, Rows
from mmalign.data.readers.source import Candidate, PairSource
from mmalign.data.readers.tabular import TablePairs

RECORD_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
FILE_SUFFIXES = (".parquet", *RECORD_SUFFIXES, *TAR_SUFFIXES)
_SHARD = re.compile(r"(\w+?)-\d+-of-\d+")  # as the hub names parquet files: train-00000-of-00645-HASH.parquet
_SPLIT = re.compile(r"(?:metadata[-_])?(train|test|validation|valid|val|dev)(?:[-_]\d+)?")
_EXPECTED = (
    "expected tables (parquet, JSON, JSONL, CSV, TSV), tars, folders chosen/ and rejected/, metadata.jsonl with "
    "chosen_file_name and rejected_file_name, or a data set saved by `datasets`"
)


class JoinedPairs:
    """Several sources one after the other; ids begin with the source's name, so that they stay different."""

    def __init__(self, name: str, parts: Sequence[PairSource], labels: Sequence[str]) -> None:
        """Take the sources, and a different label for each."""
        self.name, self._parts, self._labels = name, list(parts), list(labels)
        self.metadata: dict[str, Any] = parts[0].metadata
        self._part_of, self._row_of = array("l"), array("q")

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison."""
        self._part_of, self._row_of = array("l"), array("q")
        for index, (part, label) in enumerate(zip(self._parts, self._labels, strict=True)):
            for candidate in part.candidates():
                self._part_of.append(index)
                self._row_of.append(candidate.row)
                yield candidate._replace(row=len(self._row_of) - 1, id=f"{label}/{candidate.id}")

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both images of a comparison."""
        return self._parts[self._part_of[row]].images(self._row_of[row])

    def first_frame(self, row: int) -> Media | None:
        """Return the image that the videos of a comparison start from, if its source gives it."""
        return self._parts[self._part_of[row]].first_frame(self._row_of[row])


def open_source(source: str, config: DataConfig) -> PairSource:
    """Return the reader for a source: a file, a folder, a glob, several with commas; anything else is a hub id.

    `config` gives `caption_column`, `columns`, `default_prompt` and `streaming`.

    Raises:
        UserError: nothing is there, or it is in no known format.
    """
    if not source.strip(", "):
        raise UserError(f"pairs '{source}': empty; give {', '.join(FILE_SUFFIXES)}, a folder, a glob or a hub id")
    try:
        path = find(source)
    except UserError:
        matches = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else []
        if matches:
            return _open_several(source, [Path(match) for match in matches], config)
        first = Path(source).parts[0] if source else ""
        is_local = Path(source).suffix in FILE_SUFFIXES or is_dir(first)
        if read_hub_id(source) and not is_local:
            return TablePairs(load_hub_rows(source, streaming=config.streaming), config)
        if "," in source:
            return _open_several(source, [find(part.strip()) for part in source.split(",")], config)
        if glob.has_magic(source):
            raise UserError(f"{source}: matches no file") from None
        raise
    if config.streaming:
        raise UserError(f"data.streaming applies to data sets of the hub, and {path} is here; remove it")
    return _open_directory(path, config) if path.is_dir() else _open_file(path, config)


def _open_file(path: Path, config: DataConfig) -> PairSource:
    if is_tar(path):
        return read_tar_pairs(path, config.default_prompt)
    match path.suffix.lower():
        case ".parquet":
            rows: Rows = ParquetRows(str(path), [path])
        case suffix if suffix in RECORD_SUFFIXES:
            rows = RecordRows(path)
        case ".tfrecord" | ".tfrecords":
            raise UserError(
                f"{path}: TFRecords are not read (RichHF-18K's hold neither images nor prompts); join them with "
                "Pick-a-Pic's images into parquet with prompt, image and overall_score"
            )
        case suffix:
            raise UserError(f"{path}: pairs are not read from '{suffix}' files; use {', '.join(FILE_SUFFIXES)}")
    return TablePairs(rows, config)


def _open_directory(path: Path, config: DataConfig) -> PairSource:
    folders = paired_folders(path)
    if folders:
        return read_folder_pairs(*folders, config.default_prompt)
    if (clips := read_clip_folder(path)) is not None:
        return clips
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return TablePairs(load_saved_rows(path), config)
    for files in (
        visible(path, "**/*.parquet"),
        [file for file in visible(path, "**/metadata.*") if file.suffix in RECORD_SUFFIXES],
        [file for file in visible(path, "**/*") if is_tar(file)],
        [file for file in visible(path, "**/*") if file.suffix.lower() in RECORD_SUFFIXES],
    ):
        if files:
            return _open_several(str(path), _training_split(path, files), config)
    raise UserError(f"{path}: holds no pairs; {_EXPECTED}")


def _open_several(name: str, paths: list[Path], config: DataConfig) -> PairSource:
    if all(path.suffix.lower() == ".parquet" and not path.is_dir() for path in paths):
        return TablePairs(ParquetRows(name, paths), config)
    if len(paths) == 1:
        return _open_directory(paths[0], config) if paths[0].is_dir() else _open_file(paths[0], config)
    parts = [_open_directory(path, config) if path.is_dir() else _open_file(path, config) for path in paths]
    return JoinedPairs(name, parts, _labels(paths))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the names of files without their suffix, with as many folders as make them different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _training_split(folder: Path, files: list[Path]) -> list[Path]:
    """Return the files of the split "train" where a folder holds several, as copies of hub data sets do."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(folder, file), []).append(file)
    if "train" not in splits or len(splits) == 1:
        return files
    others = ", ".join(f"{name or 'other files'} ({len(held)})" for name, held in splits.items() if name != "train")
    note(f"{folder}: reading the split train ({len(splits['train'])} files) and leaving out {others}")
    return splits["train"]


def _split_of(folder: Path, file: Path) -> str:
    """Return the split that a file's name, or a folder above it, says; empty where nothing does."""
    shard = _SHARD.match(file.name)
    if shard:
        return shard[1]
    for part in (file.stem, *reversed(file.relative_to(folder).parts[:-1])):
        named = _SPLIT.fullmatch(part)
        if named:
            return named[1]
    return ""
