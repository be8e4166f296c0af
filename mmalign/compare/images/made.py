"""Images or videos made elsewhere as a system: the files of a folder, matched with the prompts and seeds compared.

A folder whose images have prompts (metadata.jsonl or metadata.csv, or NAME.txt and NAME.caption beside them) is
matched by the prompts. Otherwise names say the number of the prompt, from 0 or from 1: `0007-1.png` (prompt, seed),
`0007/anything.png` (the images of a prompt in a folder), `img_0007.png`. The images of one prompt stand for the
seeds in the order of their names, unless their names hold the seeds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.compare.images.media import IMAGES, ImageMedia
from mmalign.compare.systems.facts import SystemFacts
from mmalign.core.errors import UserError, shorten
from mmalign.core.files import expand, is_dir, visible
from mmalign.core.io.decode import CONTAINER_SUFFIXES
from mmalign.core.progress import note
from mmalign.core.resources import find
from mmalign.scoring.inputs import find_items
from mmalign.scoring.pictures import holds_pictures

_MODEL_FILES = ("model_index.json", "config.json", "*.safetensors")
_NUMBERED = re.compile(r"\D*(\d+)(?:\D+(\d+))?\D*")
_Found = dict[int, dict[int, Path]]
"""Prompt -> place among its images, or their seed -> file."""


class MadeImages:
    """The images, or videos, of one system over prompts and seeds, each a file that is there already."""

    def __init__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        files: Mapping[tuple[int, int], Path],
        media: ImageMedia = IMAGES,
    ) -> None:
        """Take the file of each prompt's number and seed."""
        self.prompts, self.seeds, self._files, self.media = list(prompts), list(seeds), dict(files), media

    def path(self, index: int, seed: int) -> Path:
        """Return the path of the image of a prompt and a seed."""
        return self._files[index, seed]

    def fingerprint(self) -> str:
        """Return a hash of the contents of all images."""
        digest = hashlib.blake2b(digest_size=16)
        for place in sorted(self._files):
            digest.update(hashlib.blake2b(self._files[place].read_bytes(), digest_size=16).digest())
        return digest.hexdigest()

    def facts(self, name: str, folder: str, trained_on: Sequence[str] | None) -> SystemFacts:
        """Return the facts of the system for the report."""
        return SystemFacts(name, folder, 1.0, self.fingerprint(), trained_on=list(trained_on or []), made=True)


def as_system(name: str, given: str) -> dict[str, str]:
    """Return the entry of a system for a model, or for a folder that holds images or videos and no model."""
    folder = expand(given)
    if is_dir(folder) and not any(next(folder.glob(pattern), None) for pattern in _MODEL_FILES):
        if any(path.suffix.lower() in CONTAINER_SUFFIXES for path in visible(folder, "**/*")):
            return {"name": name, "videos": given}  # `mmalign generate` writes a picture beside them
        if holds_pictures(folder):
            return {"name": name, "images": given}
    return {"name": name, "model": given}


def match_images(given: str, prompts: Sequence[str], seeds: Sequence[int], media: ImageMedia = IMAGES) -> MadeImages:
    """Return the images, or videos, of a folder for every prompt and seed.

    Raises:
        UserError: there is no such folder, an image cannot be matched, or one is missing (it is named).
    """
    folder = find(given)
    if not folder.is_dir():
        raise UserError(f"{given}: is a file; give the folder of the {media.modality}s")
    items = find_items([str(folder)], media.modality).items
    named = {Path(str(item.media)): item.prompt for item in items if item.prompt is not None}
    if named and len(named) < len(items):
        bare = next(item.name for item in items if item.prompt is None)
        raise UserError(
            f"{bare}: has no prompt, and {len(named)} {media.modality}s beside it have one; give all or none"
        )
    paths = sorted((Path(str(item.media)) for item in items), key=_in_order)
    found = _by_prompt(paths, named, prompts, len(seeds)) if named else _by_name(folder, paths, len(prompts))
    files: dict[tuple[int, int], Path] = {}
    for index, held in found.items():
        own = list(seeds) if set(seeds) <= held.keys() else sorted(held)[: len(seeds)]
        files |= {(index, seed): held[place] for seed, place in zip(seeds, own, strict=False)}
    _refuse_missing(given, prompts, seeds, files, found, media)
    if len(files) < len(paths):
        note(
            f"{given}: {len(paths) - len(files)} of {len(paths)} {media.modality}s belong to no prompt and seed, and "
            "are not used"
        )
    return MadeImages(prompts, seeds, files, media)


def _by_prompt(paths: Sequence[Path], named: Mapping[Path, str | None], prompts: Sequence[str], count: int) -> _Found:
    """Match by text; a prompt that is compared twice takes the next images of that text."""
    held: dict[str, list[Path]] = {}
    for path in paths:
        held.setdefault(str(named[path]).strip(), []).append(path)
    repeated = {text for text in prompts if prompts.count(text) > 1} if len(set(prompts)) < len(prompts) else set()
    found: _Found = {}
    for index, text in enumerate(prompts):
        files = held.get(text.strip(), [])
        if text in repeated:
            held[text.strip()], files = files[count:], files[:count]
        found[index] = _placed([(_numbers(path.stem)[1], path) for path in files])
    return found


def _placed(files: Sequence[tuple[int | None, Path]]) -> dict[int, Path]:
    """Return files by their numbers where all have one of their own, else by their place."""
    numbered = {number: path for number, path in files if number is not None}
    return numbered if len(numbered) == len(files) else dict(enumerate(path for _, path in files))


def _by_name(folder: Path, paths: Sequence[Path], count: int) -> _Found:
    """Match by the numbers in names of files, or of the folders that hold the images of one prompt."""
    numbered: dict[int, list[tuple[int | None, Path]]] = {}
    for path in paths:
        inside = path.relative_to(folder)
        grouped = len(inside.parts) > 1
        index, seed = _numbers(inside.parts[0] if grouped else inside.stem)
        if index is None:
            raise UserError(
                f"{path}: cannot be matched with a prompt; name it by the prompt's number as 0007-0.png or "
                "0007/0.png, or give prompts by metadata.jsonl or NAME.txt"
            )
        numbered.setdefault(index, []).append((_numbers(inside.stem)[0] if grouped else seed, path))
    first = 1 if 0 not in numbered and max(numbered, default=0) == count else 0
    if 0 not in numbered and max(numbered, default=0) > count:
        raise UserError(
            f"{folder}: no file is of the number 0, and there are more than the {count} prompts, so that it is not"
            " clear whether they are counted from 0 or from 1; give prompts by metadata.jsonl or NAME.txt"
        )
    return {index - first: _placed(held) for index, held in numbered.items() if first <= index < first + count}


def _numbers(text: str) -> tuple[int | None, int | None]:
    """Return the number that a name begins with, letters aside, and a second one; None where it has none, or more."""
    found = _NUMBERED.fullmatch(text)
    if found is None:
        return None, None
    return int(found[1]), None if found[2] is None else int(found[2])


def _in_order(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts 10.png after 9.png."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path))]


def _refuse_missing(
    given: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    files: Mapping[tuple[int, int], Path],
    found: _Found,
    media: ImageMedia,
) -> None:
    missing = [(index, seed) for index in range(len(prompts)) for seed in seeds if (index, seed) not in files]
    if not missing:
        return
    index, seed = missing[0]
    counts = {len(held) for held in found.values()}
    few = len(counts) == 1 and len(found) == len(prompts) and max(counts) < len(seeds)
    fix = f"; it has {max(counts)} for each prompt: compare fewer seeds" if few and max(counts) else ""
    raise UserError(
        f"{given}: {len(missing)} of {len(prompts) * len(seeds)} {media.modality}s are missing, the first for prompt "
        f"{index} ('{shorten(prompts[index])}') and seed {seed}{fix}"
    )
