"""Pairs of answers for vision-language models, from a parquet or JSONL table with prompts and media.

Columns: `prompt`, `chosen`, `rejected`, and `video`, `image` or `images`, paths relative to the table or bytes.
Optional: `rejected_video` or `rejected_image`, media of the rejected answer's own; `fps`, the frames a second of a
video that does not state it (such as a folder of frames), or states it wrongly; `id`, `aspect`, `margin` (how much
better the
chosen answer is), `difficulty`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.config.sections import DataConfig
from mmalign.core.errors import LONGEST_PATH, UserError, did_you_mean, shorten
from mmalign.core.files import exists, is_dir, visible
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media
from mmalign.core.io.tables import Table
from mmalign.core.resources import find
from mmalign.data.readers.source import check_unique, choose_caption_column, id_of, number_of
from mmalign.data.readers.tabular import ID_COLUMNS, as_media

ANSWERS = ("chosen", "rejected")
MEDIA = {"video": "rejected_video", "image": "rejected_image", "images": "rejected_image"}
"""Columns of media -> the column of the rejected answer's own."""
SUFFIXES = (".parquet", ".jsonl")
_ENDS = 2**20


@dataclass(frozen=True)
class VlmPair:
    """A prompt about media with two answers; `rejected_media` is None where both are about the same."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    kind: Literal["video", "image"]
    media: tuple[Media, ...]
    rejected_media: tuple[Media, ...] | None = None
    fps: float | None = None
    aspect: str | None = None
    margin: float = math.nan
    difficulty: int | None = None

    def media_ids(self) -> tuple[str, str]:
        """Return identifiers of the media of either side by their bytes; the second is empty without own media."""
        own, other = (",".join(media_digest(one) for one in side or ()) for side in (self.media, self.rejected_media))
        return own, other

    def facts(self) -> tuple[Any, ...]:
        """Return the facts that identify the pair besides its media: texts and numbers."""
        return self.id, self.prompt, self.chosen, self.rejected, self.kind, self.fps, self.margin, self.difficulty


class VlmPairTable:
    """The pairs of one table: texts in memory, media in place; made by `read_vlm_pairs`."""

    def __init__(self, name: str, rows: list[_Row], media: Callable[[int], Mapping[str, Any]], folder: Path) -> None:
        """Keep checked rows; `media` returns the cells of a row of the table that hold media.

        Raises:
            UserError: a row's media are missing or contradictory.
        """
        self.name = name
        self._rows, self._media, self._folder = rows, media, folder
        self.ids = [row.id for row in rows]
        self.prompts = [row.prompt for row in rows]
        self.aspects = [row.aspect for row in rows]
        self.same_answers = [row.chosen.strip() == row.rejected.strip() for row in rows]
        self.left_out = 0
        self.kinds: list[str] = []
        self.own_media: list[bool] = []
        for pair in self:  # the one pass over all media, so that errors show before a run
            self.kinds.append(pair.kind)
            self.own_media.append(pair.rejected_media is not None)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def __iter__(self) -> Iterator[VlmPair]:
        """Yield every pair in the order of the table."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> VlmPair:
        """Return one pair, its media as bytes or paths, not decoded.

        Raises:
            UserError: it has no media, more than one kind, or media that do not exist.
        """
        row = self._rows[index]
        where, cells = f"{self.name}: row {row.number}", self._media(row.number)
        column = _media_column(cells, where)
        rejected = cells.get(MEDIA[column])
        if rejected is None and self.same_answers[index]:
            raise UserError(f"{where}: chosen and rejected are the same answer about the same media; leave it out")
        return VlmPair(
            id=row.id,
            prompt=row.prompt,
            chosen=row.chosen,
            rejected=row.rejected,
            kind="video" if column == "video" else "image",
            media=self._files(cells[column], f"{where}, {column}"),
            rejected_media=None if rejected is None else self._files(rejected, f"{where}, {MEDIA[column]}"),
            fps=row.fps,
            aspect=row.aspect,
            margin=row.margin,
            difficulty=row.difficulty,
        )

    @property
    def counts(self) -> str:
        """The number of pairs, and of those left out, in words."""
        return f"{len(self)} pairs of answers" + (f", {self.left_out} left out" if self.left_out else "")

    def margins(self) -> list[float]:
        """Return the margin of each chosen answer; NaN where the table has none."""
        return [row.margin for row in self._rows]

    def difficulties(self) -> list[int | None]:
        """Return the difficulty of each pair; None where the table has none."""
        return [row.difficulty for row in self._rows]

    def _files(self, cell: Any, where: str) -> tuple[Media, ...]:
        found = tuple(as_media(one, self._folder, where) for one in (cell if isinstance(cell, list) else [cell]))
        missing = next((one for one in found if isinstance(one, Path) and not exists(one)), None)
        if missing is not None or not found:
            raise UserError(
                f"{where}: {f'{shorten(str(missing), LONGEST_PATH)} does not exist' if missing else 'no media'}"
            )
        return found


def read_vlm_pairs(source: str, config: DataConfig, difficulties: Collection[int] = ()) -> VlmPairTable:
    """Return the pairs of a table, every row checked but no media decoded; with `difficulties`, those pairs alone.

    `config` gives `caption_column` (by default "prompt" does too), `min_margin` and `limit`.

    Raises:
        UserError: no such table, a missing column, a row that is no pair, or nothing is left; one line.
    """
    path = find(source)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{source}: pairs of answers come in a table; give a {' or '.join(SUFFIXES)} file")
    table = Table(path)
    columns = table.columns
    prompt = choose_caption_column(columns, config.caption_column, source)
    lacking = [name for name in ANSWERS if name not in columns]
    if lacking:
        raise missing_columns(source, lacking, columns)
    if not any(name in columns for name in MEDIA):
        raise missing_columns(source, [next(iter(MEDIA))], columns, f"; media are in {', '.join(MEDIA)}")
    identifier = next((name for name in ID_COLUMNS if name in columns), None)
    media = [name for name in columns if name in {*MEDIA, *MEDIA.values()}]
    rows = table.rows([name for name in columns if name not in media])
    read = [_row(number, row, prompt, identifier, f"{source}: row {number}") for number, row in enumerate(rows)]
    kept = [row for row in read if not difficulties or row.difficulty in difficulties]
    if config.min_margin is not None:
        unknown = next((row for row in kept if math.isnan(row.margin)), None)
        if unknown is not None:
            raise UserError(f"data.min_margin: {source} gives no margin for pair '{unknown.id}'; remove min_margin")
        kept = [row for row in kept if row.margin >= config.min_margin]
    pairs = VlmPairTable(source, kept[: config.limit], table.cells(media), path.parent)
    pairs.left_out = len(read) - len(pairs)
    if not len(pairs):
        raise UserError(f"{source}: no pair is left of {len(read)}")
    check_unique(pairs.ids, source)
    return pairs


@dataclass(frozen=True)
class _Row:
    """The fields of a row besides its media."""

    number: int
    id: str
    prompt: str
    chosen: str
    rejected: str
    fps: float | None
    aspect: str | None
    margin: float
    difficulty: int | None


def _row(number: int, row: Mapping[str, Any], prompt: str, identifier: str | None, where: str) -> _Row:
    for column in (prompt, *ANSWERS):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise UserError(f"{where} has no text in column '{column}' ({row.get(column)!r})")
    name = row.get(identifier) if identifier else None
    fps, difficulty = _number(row, "fps", where), _number(row, "difficulty", where)
    if fps is not None and fps <= 0:
        raise UserError(f"{where}: fps {fps:g}; the rate must be above 0")
    if difficulty is not None and difficulty != int(difficulty):
        raise UserError(f"{where}: difficulty {difficulty:g}; give a whole number, such as 16")
    margin = _number(row, "margin", where)
    return _Row(
        number,
        id_of(name, number),
        row[prompt],
        row["chosen"],
        row["rejected"],
        fps,
        None if row.get("aspect") is None else str(row["aspect"]),
        math.nan if margin is None else margin,
        None if difficulty is None else int(difficulty),
    )


def _number(row: Mapping[str, Any], column: str, where: str) -> float | None:
    given = row.get(column)
    value = number_of(given, f"{where}: {column}")
    if isinstance(given, bool) or math.isinf(value) or (math.isnan(value) and isinstance(given, float)):
        raise UserError(f"{where}: {column} is {given!r}; give a number, or nothing")
    return None if math.isnan(value) else value


def _media_column(cells: Mapping[str, Any], where: str) -> str:
    filled = [name for name in MEDIA if cells.get(name) is not None]
    if len(filled) != 1:
        raise UserError(f"{where} has {' and '.join(filled) or 'no media'}; give one of {', '.join(MEDIA)}")
    own = [name for name in MEDIA.values() if cells.get(name) is not None and name != MEDIA[filled[0]]]
    if own:
        raise UserError(f"{where} has {filled[0]} and {own[0]}{did_you_mean(own[0], [MEDIA[filled[0]]])}")
    return filled[0]


def media_digest(media: Media) -> str:
    """Identify media by content; of a file of more than two megabytes by its size and both its ends."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(media, bytes):
        digest.update(media)
        return digest.hexdigest()
    for file in visible(media) if is_dir(media) else [media]:
        with file.open("rb") as content:
            size = file.stat().st_size
            digest.update(f"{size};".encode() + content.read(_ENDS))
            content.seek(max(_ENDS, size - _ENDS))
            digest.update(content.read())
    return digest.hexdigest()
