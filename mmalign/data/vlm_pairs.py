"""Pairs of answers for vision-language models, from a table (parquet, JSONL, CSV or TSV) with prompts and media.

Columns: `prompt`, `chosen`, `rejected`, and `video`, `image` or `images`, paths relative to the table or bytes.
Optional: `rejected_video` or `rejected_image`, media of the rejected answer's own; `fps`, the frames a second of a
video that does not state it (such as a folder of frames), or states it wrongly; `rejected_fps`, that of
`rejected_video` (default: `fps`); `id`, `aspect`, `margin` (how much better the chosen answer is), `difficulty`.
The rates decide which frames are taken; both sides are shown to the model at the rate of the chosen side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.config.sections import DataConfig
from mmalign.core.errors import LONGEST_PATH, UserError, did_you_mean, shorten
from mmalign.core.files import exists, is_dir, visible
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import Media
from mmalign.core.io.tables import TABLE_SUFFIXES, Table
from mmalign.core.progress import note
from mmalign.core.resources import find
from mmalign.data.readers.source import check_unique, choose_caption_column, id_of, number_of
from mmalign.data.readers.tabular import ID_COLUMNS, as_media
from pipelines.errors import PipelineError

ANSWERS = ("chosen", "rejected")
MEDIA = {"video": "rejected_video", "image": "rejected_image", "images": "rejected_image"}
"""Columns of media -> the column of the rejected answer's own."""
SUFFIXES = tuple(sorted(TABLE_SUFFIXES))
MOST_NAMED = 20
"""Bad rows that are named one by one; further ones are counted."""
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
    rejected_fps: float | None = None
    aspect: str | None = None
    margin: float = math.nan
    difficulty: int | None = None

    def media_ids(self) -> tuple[str, str]:
        """Return identifiers of the media of either side by their bytes; the second is empty without own media."""
        own, other = (",".join(media_digest(one) for one in side or ()) for side in (self.media, self.rejected_media))
        return own, other

    def facts(self) -> tuple[Any, ...]:
        """Return the facts that identify the pair besides its media: texts and numbers."""
        texts = self.id, self.prompt, self.chosen, self.rejected, self.kind
        return *texts, self.fps, self.rejected_fps, self.margin, self.difficulty


class BadRows:
    """Counts rows that cannot be used, or raises the first one's error, as `data.on_bad` says."""

    def __init__(self, on_bad: Literal["error", "skip"] = "error") -> None:
        """Start with none."""
        self.skips = on_bad == "skip"
        self.reasons: list[str] = []

    @contextmanager
    def row(self) -> Iterator[None]:
        """Context of the work on one row.

        Raises:
            UserError: the row is bad, and bad ones are not left out.
        """
        try:
            yield
        except (UserError, PipelineError) as error:
            if not self.skips:
                raise UserError(f"{error}; data.on_bad=skip leaves such rows out") from None
            self.reasons.append(str(error))
            if len(self.reasons) <= MOST_NAMED:
                note(f"left out: {error}")

    @property
    def counts(self) -> list[str]:
        """The number of bad rows in words, if there are any."""
        return [f"{len(self.reasons)} bad"] * bool(self.reasons)


class VlmPairTable:
    """The pairs of one table: texts in memory, media in place; made by `read_vlm_pairs`."""

    def __init__(
        self, name: str, rows: list[_Row], media: Callable[[int], Mapping[str, Any]], folder: Path, bad: BadRows
    ) -> None:
        """Keep checked rows; `media` returns the cells of a row of the table that hold media.

        Raises:
            UserError: a row's media are missing or contradictory, and bad rows are not left out.
        """
        self.name, self.bad = name, bad
        self._media, self._folder = media, folder
        self._rows: list[_Row] = []
        self.left_out = 0
        self.kinds: list[str] = []
        self.own_media: list[bool] = []
        for row in rows:  # the one pass over all media, so that errors show before a run
            with bad.row():
                pair = self._pair(row)
                self._rows.append(row)
                self.kinds.append(pair.kind)
                self.own_media.append(pair.rejected_media is not None)
        self.ids = [row.id for row in self._rows]
        self.prompts = [row.prompt for row in self._rows]
        self.aspects = [row.aspect for row in self._rows]
        self.same_answers = [_same(row) for row in self._rows]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def __iter__(self) -> Iterator[VlmPair]:
        """Yield every pair in the order of the table."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> VlmPair:
        """Return one pair, its media as bytes or paths, not decoded.

        Raises:
            UserError: its media no longer exist.
        """
        return self._pair(self._rows[index])

    def where(self, index: int) -> str:
        """Return the place of a pair, for messages: the table, the row and the id."""
        row = self._rows[index]
        return f"{self.name}: row {row.number}, pair '{row.id}'"

    def _pair(self, row: _Row) -> VlmPair:
        where, cells = f"{self.name}: row {row.number}", self._media(row.number)
        column = _media_column(cells, where)
        rejected = cells.get(MEDIA[column]) or None
        if rejected is None and _same(row):
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
            rejected_fps=row.rejected_fps,
            aspect=row.aspect,
            margin=row.margin,
            difficulty=row.difficulty,
        )

    @property
    def counts(self) -> str:
        """The number of pairs, and of those left out, in words."""
        left = [f"{self.left_out} left out"] * bool(self.left_out)
        return ", ".join([f"{len(self)} pairs of answers", *left, *self.bad.counts])

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
    bad, read = BadRows(config.on_bad), []
    for number, row in enumerate(table.rows([name for name in columns if name not in media])):
        with bad.row():
            read.append(_row(number, row, prompt, identifier, f"{source}: row {number}"))
    kept = [row for row in read if not difficulties or row.difficulty in difficulties]
    if config.min_margin is not None:
        unknown = next((row for row in kept if math.isnan(row.margin)), None)
        if unknown is not None:
            raise UserError(f"data.min_margin: {source} gives no margin for pair '{unknown.id}'; remove min_margin")
        kept = [row for row in kept if row.margin >= config.min_margin]
    taken = kept[: config.limit]
    pairs = VlmPairTable(source, taken, table.cells(media), path.parent, bad)
    pairs.left_out = len(read) - len(taken)
    if not len(pairs):
        raise UserError(f"{source}: no pair is left of {len(read)}{''.join(f'; {one}' for one in bad.counts)}")
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
    rejected_fps: float | None
    aspect: str | None
    margin: float
    difficulty: int | None


def _same(row: _Row) -> bool:
    return row.chosen.strip() == row.rejected.strip()


def _row(number: int, row: Mapping[str, Any], prompt: str, identifier: str | None, where: str) -> _Row:
    for column in (prompt, *ANSWERS):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise UserError(f"{where} has no text in column '{column}' ({row.get(column)!r})")
    name = row.get(identifier) if identifier else None
    fps, rejected_fps, difficulty = (_number(row, key, where) for key in ("fps", "rejected_fps", "difficulty"))
    for key, rate in (("fps", fps), ("rejected_fps", rejected_fps)):
        if rate is not None and rate <= 0:
            raise UserError(f"{where}: {key} {rate:g}; the rate must be above 0")
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
        fps if rejected_fps is None else rejected_fps,
        str(row["aspect"]) if row.get("aspect") not in (None, "") else None,
        math.nan if margin is None else margin,
        None if difficulty is None else int(difficulty),
    )


def _number(row: Mapping[str, Any], column: str, where: str) -> float | None:
    given = None if row.get(column) == "" else row.get(column)  # an empty field of a CSV
    value = number_of(given, f"{where}: {column}")
    if isinstance(given, bool) or math.isinf(value) or (math.isnan(value) and isinstance(given, float)):
        raise UserError(f"{where}: {column} is {given!r}; give a number, or nothing")
    return None if math.isnan(value) else value


def _media_column(cells: Mapping[str, Any], where: str) -> str:
    filled = [name for name in MEDIA if cells.get(name) not in (None, "")]
    if len(filled) != 1:
        raise UserError(f"{where} has {' and '.join(filled) or 'no media'}; give one of {', '.join(MEDIA)}")
    own = [name for name in MEDIA.values() if cells.get(name) not in (None, "") and name != MEDIA[filled[0]]]
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
