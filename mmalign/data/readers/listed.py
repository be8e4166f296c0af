"""Pairs of files: folders `chosen/` and `rejected/` of images or videos, and tars whose samples hold both images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmalign.core.errors import UserError
from mmalign.core.files import LeftOut, is_file, visible
from mmalign.core.io.decode import CONTAINER_SUFFIXES, IMAGE_SUFFIXES
from mmalign.core.io.images import Media
from mmalign.core.io.items import Item, bytes_or_file
from mmalign.core.io.sidecars import read_sidecar, sidecars
from mmalign.core.io.tars import tar_items
from mmalign.core.progress import note
from mmalign.data.readers.source import NO_FACTS, Candidate

SIDE_NAMES = (("chosen", "rejected"), ("w", "l"))
"""What folders, or parts of the names in a tar, call the preferred image and the other."""


class ListedPairs:
    """Comparisons whose images lie in files or in an archive; small enough to be held in memory as places."""

    def __init__(self, name: str) -> None:
        """Start empty."""
        self.name = name
        self.metadata: dict[str, Any] = {}
        self._candidates: list[Candidate] = []
        self._images: list[tuple[Any, Any]] = []

    def add(
        self,
        prompt: str,
        identifier: str,
        images: tuple[Any, Any],
        scores: tuple[float, float] = (math.nan, math.nan),
        weight: float = math.nan,
    ) -> None:
        """Append one comparison; the first image is preferred."""
        clip = NO_FACTS._replace(weight=weight)
        self._candidates.append(Candidate(len(self._images), prompt, identifier, 1.0, 0.0, *scores, clip=clip))
        self._images.append(images)

    def leave_out(self, fault: str) -> None:
        """Count a row that is no comparison."""
        self._candidates.append(Candidate(-1, "", "", math.nan, math.nan, fault=fault))

    def candidates(self) -> Iterator[Candidate]:
        """Yield every comparison."""
        return iter(self._candidates)

    def images(self, row: int) -> tuple[Media, Media]:
        """Return both images of a row."""
        first, second = self._images[row]
        return bytes_or_file(first), bytes_or_file(second)

    def first_frame(self, row: int) -> Media | None:
        """Return None: files hold no image beside the sides."""
        return None


def paired_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of chosen and rejected images inside `folder`, or None if it has none."""
    for chosen, rejected in SIDE_NAMES:
        if (folder / chosen).is_dir() and (folder / rejected).is_dir():
            return folder / chosen, folder / rejected
    return None


def read_folder_pairs(chosen: Path, rejected: Path, default_prompt: str | None = None) -> ListedPairs:
    """Return the pairs of two folders: images of the same stem belong together, `stem.txt` holds the caption.

    The caption may lie in either folder or in their parent, in `stem.caption` too; pairs without one take
    `default_prompt`.

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
        caption = _caption(stem, (chosen, rejected, chosen.parent), default_prompt)
        pairs.add(caption, stem, (sides[0][stem], sides[1][stem]))
    return pairs


def _by_stem(folder: Path, left_out: LeftOut) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in visible(folder):
        if not is_file(path) or path.suffix.lower() not in IMAGE_SUFFIXES | CONTAINER_SUFFIXES:
            left_out.add(path)
        else:
            if path.stem in found:
                raise UserError(f"{folder}: '{found[path.stem].name}' and '{path.name}' have the same stem; keep one")
            found[path.stem] = path
    return found


def _caption(stem: str, folders: tuple[Path, ...], default: str | None) -> str:
    files = [path for folder in folders for path in sidecars(folder / stem)]
    captions = {read_sidecar(path) for path in files}
    if not captions and default is not None:
        return default
    if len(captions) != 1:
        none = f"has no caption file '{stem}.txt' or '{stem}.caption'; add it, or set data.default_prompt"
        problem = f"has different captions: {sorted(captions)}; both sides share one caption" if captions else none
        raise UserError(f"{folders[-1]}: pair '{stem}' {problem}")
    return captions.pop()


def read_tar_pairs(path: Path, default_prompt: str | None = None) -> ListedPairs:
    """Return the pairs of a tar: 0001.chosen.jpg, 0001.rejected.jpg and 0001.txt, or the same in two folders.

    Images that are no side of a pair are left out and counted. The prompt is that of either side, else
    `default_prompt`.

    Raises:
        UserError: the tar is damaged, a side lacks its partner or both lack a prompt, or prompts disagree.
    """
    pairs, left_out = ListedPairs(str(path)), Counter[str]()
    found: dict[str, dict[int, Item]] = {}
    for item in tar_items(path, "image"):
        name = item.name.removeprefix(f"{path}/")
        key, side = _side_of(name)
        if side is None:
            left_out[PurePosixPath(name).suffix.lower()] += 1
        elif found.setdefault(key, {}).setdefault(side, item) is not item:
            raise UserError(f"{path}: '{key}' has two {SIDE_NAMES[0][side]} images; keep one")
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        note(f"{path}: {sum(map(len, found.values()))} images read, {left_out.total()} left out as no side: {kinds}")
    for key, sides in found.items():
        if len(sides) == 1:
            lacking = SIDE_NAMES[0][1 - next(iter(sides))]
            raise UserError(f"{path}: pair '{key}' has no {lacking} image; add it or remove the other")
        prompts: set[str | None] = {item.prompt for item in sides.values() if item.prompt is not None} or {
            default_prompt
        }
        if len(prompts) != 1 or None in prompts:
            problem = f"has different prompts: {sorted(map(str, prompts))}" if len(prompts) > 1 else "has no prompt"
            raise UserError(f"{path}: pair '{key}' {problem}; give it one text, {key}.txt, or set data.default_prompt")
        pairs.add(str(prompts.pop()), key, (sides[0].media, sides[1].media))
    return pairs


def _side_of(name: str) -> tuple[str, int | None]:
    """Return the pair that a member belongs to and its side: 0 chosen, 1 rejected, None neither."""
    path = PurePosixPath(name)
    parts = [*path.parts[:-1], *path.stem.split(".")]
    for sides in SIDE_NAMES:
        for place in (len(parts) - 1, *range(len(path.parts) - 1)):
            if parts[place] in sides:
                rest = parts[:place] + parts[place + 1 :]
                return "/".join(rest), sides.index(parts[place])
    return name, None
