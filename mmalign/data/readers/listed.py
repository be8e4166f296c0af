"""Pairs listed as paths: HPDv2-style JSON, JSON or JSONL with `prompt, chosen, rejected`, and paired folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from mmalign.core.errors import UserError
from mmalign.core.files import LeftOut, is_file, visible
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.decode import IMAGE_SUFFIXES
from mmalign.core.io.images import Media
from mmalign.core.io.tables import json_lines, read_text
from mmalign.core.progress import note
from mmalign.data.readers.source import Candidate, choose_caption_column, id_of

IMAGE_LISTS = ("image_path", "images", "file_path")
FOLDER_NAMES = (("chosen", "rejected"), ("w", "l"))


class ListedPairs:
    """Comparisons whose images are files; small enough to be held in memory as paths."""

    def __init__(self, name: str) -> None:
        """Start empty."""
        self.name = name
        self.metadata: dict[str, Any] = {}
        self._candidates: list[Candidate] = []
        self._images: list[tuple[Path, Path]] = []

    def add(self, prompt: str, identifier: str, images: tuple[Path, Path], labels: tuple[float, float]) -> None:
        """Append one comparison; the larger label is preferred."""
        self._candidates.append(Candidate(len(self._candidates), prompt, identifier, *labels))
        self._images.append(images)

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison."""
        return iter(self._candidates)

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both images of a row."""
        return self._images[row]


def read_json_pairs(path: Path, caption: str) -> ListedPairs:
    """Return the pairs of a JSON or JSONL file; paths are relative to it.

    A record holds either `prompt, chosen, rejected`, or HPDv2's `prompt`, a list of images (`image_path`, `images` or
    `file_path`) and `human_preference` (1 for the preferred) or `rank` (lower is better); of more than two images
    every comparison becomes a candidate.

    Raises:
        UserError: malformed JSON (with the line), or a record that lacks a key.
    """
    pairs = ListedPairs(str(path))
    for number, record in enumerate(_records(path), start=1):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is a {type(record).__name__}; expected an object")
        prompt = record[choose_caption_column(list(record), caption, where)]
        if not isinstance(prompt, str):
            raise UserError(f"{where}: the prompt is a {type(prompt).__name__}; expected text")
        identifier = id_of(record.get("id"), number)
        images_key = next((key for key in IMAGE_LISTS if key in record), None)
        if images_key is not None:
            _add_ranked(pairs, path, record, record[images_key], (prompt, identifier, where))
        elif "chosen" in record and "rejected" in record:
            sides = _path(path, record["chosen"], where), _path(path, record["rejected"], where)
            pairs.add(prompt, identifier, sides, (1.0, 0.0))
        else:
            lacking = [key for key in ("chosen", "rejected") if key not in record]
            raise missing_columns(where, lacking, record, f" (or HPDv2's {IMAGE_LISTS[0]} and human_preference)")
    return pairs


def _add_ranked(
    pairs: ListedPairs, path: Path, record: Mapping[str, Any], images: Any, names: tuple[str, str, str]
) -> None:
    prompt, identifier, where = names
    preferred, rank = record.get("human_preference"), record.get("rank")
    if preferred is None and rank is None:
        raise missing_columns(where, ["human_preference"], record, " (or 'rank')")
    given = preferred if preferred is not None else rank
    merits = given if isinstance(given, list) else []
    if not isinstance(images, list) or len(images) != len(merits) or len(images) < 2:
        raise UserError(f"{where}: needs at least 2 images and a preference for each; found {images} and {given}")
    if not all(isinstance(merit, int | float) for merit in merits):
        raise UserError(f"{where}: preferences and ranks are numbers; found {merits}")
    merits = merits if preferred is not None else [-place for place in merits]
    files = [_path(path, image, where) for image in images]
    for first, second in combinations(range(len(files)), 2):
        name = identifier if len(files) == 2 else f"{identifier}-{first}-{second}"
        pairs.add(prompt, name, (files[first], files[second]), (float(merits[first]), float(merits[second])))


def _path(listing: Path, given: Any, where: str) -> Path:
    if not isinstance(given, str) or not given:
        raise UserError(f"{where}: expected the path of an image, found {given!r}")
    # HPDv2's train.json names files that lie in train/ beside it.
    candidates = [listing.parent / given, listing.parent / listing.stem / given, listing.parent / "images" / given]
    return next((path for path in candidates if is_file(path)), candidates[0])


def _records(path: Path) -> Iterator[Any]:
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        yield from (value for _, value in json_lines(path, text.split("\n")))
    elif text.strip():
        try:
            loaded = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None
        yield from loaded if isinstance(loaded, list) else [loaded]


def paired_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of chosen and rejected images inside `folder`, or None if it has none."""
    for chosen, rejected in FOLDER_NAMES:
        if (folder / chosen).is_dir() and (folder / rejected).is_dir():
            return folder / chosen, folder / rejected
    return None


def read_folder_pairs(chosen: Path, rejected: Path) -> ListedPairs:
    """Return the pairs of two folders: images of the same stem belong together, `stem.txt` holds the caption.

    The caption may lie in either folder or in their parent.

    Raises:
        UserError: a stem without a partner or a caption, two images of one stem, or captions that disagree.
    """
    pairs = ListedPairs(str(chosen.parent))
    left_out = LeftOut()
    sides = _by_stem(chosen, left_out), _by_stem(rejected, left_out)
    if left_out.kinds:
        note(f"{pairs.name}: {sum(map(len, sides))} images read, {left_out}")
    alone = sorted(sides[0].keys() ^ sides[1].keys())
    if alone:
        raise UserError(
            f"{pairs.name}: {len(alone)} images are only in one of {chosen.name}/ and {rejected.name}/, "
            f"e.g. '{alone[0]}'; add the partner or remove them"
        )
    for stem in sorted(sides[0]):
        caption = _caption(stem, (chosen, rejected, chosen.parent))
        pairs.add(caption, stem, (sides[0][stem], sides[1][stem]), (1.0, 0.0))
    return pairs


def _by_stem(folder: Path, left_out: LeftOut) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in visible(folder):
        if not is_file(path) or path.suffix.lower() not in IMAGE_SUFFIXES:
            left_out.add(path)
        else:
            if path.stem in found:
                raise UserError(f"{folder}: '{found[path.stem].name}' and '{path.name}' have the same stem; keep one")
            found[path.stem] = path
    return found


def _caption(stem: str, folders: tuple[Path, ...]) -> str:
    files = [folder / f"{stem}.txt" for folder in folders if (folder / f"{stem}.txt").is_file()]
    captions = {path.read_text(encoding="utf-8-sig").strip() for path in files}
    if len(captions) != 1:
        problem = f"has different captions: {sorted(captions)}" if captions else f"has no caption file '{stem}.txt'"
        raise UserError(f"{folders[-1]}: pair '{stem}' {problem}; both sides share one caption")
    return captions.pop()
