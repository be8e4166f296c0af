"""Pictures to make pairs of, those of one prompt together: sampled images, existing pairs, or folders of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mmalign.core.errors import UserError
from mmalign.core.files import is_dir, is_file, visible
from mmalign.core.hashing import content_key
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.decode import IMAGE_SUFFIXES
from mmalign.core.io.items import Item, Media, bytes_or_file
from mmalign.core.io.parquet import ForwardReader, iterate_columns, open_parquet
from mmalign.core.io.sidecars import SIDECAR_SUFFIXES, read_sidecar
from mmalign.core.progress import note
from mmalign.scoring.inputs import find_items

SOURCE_COLUMNS = ("prompt", "prompt_id", "seed", "image", "model")
FOLDER_PROMPT = "prompt"
"""The name, without its suffix, of a text file with the prompt of all pictures of its folder."""


@dataclass(frozen=True)
class Picture:
    """One picture. Pictures of one `group` follow each other; they have one prompt and make pairs.

    `pair` is the id of the existing pair that the group is, and `chosen` whether that pair prefers the picture (None:
    neither). `uid` is a name of the picture that no other has. `first_frame` is the image that a video started from,
    where the source holds it.
    """

    group: str
    uid: str
    prompt: str
    media: Media
    model: str = ""
    pair: str | None = None
    chosen: bool | None = None
    first_frame: bytes | Path | None = None

    def read(self) -> bytes:
        """Return the encoded picture.

        Raises:
            OSError: it cannot be read.
        """
        found = bytes_or_file(self.media)
        return found.read_bytes() if isinstance(found, Path) else found

    def item(self) -> Item:
        """Return the picture as something to score, itself with it."""
        place = self.media if isinstance(self.media, Path) else f"image of '{self.prompt}'"
        return Item(str(place), self.media, self.prompt, extra=self)


class Pair(Protocol):
    """An existing pair; chosen and rejected mean nothing where it is a tie."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def prompt(self) -> str: ...  # noqa: D102

    @property
    def chosen(self) -> bytes | Path: ...  # noqa: D102

    @property
    def rejected(self) -> bytes | Path: ...  # noqa: D102

    @property
    def tie(self) -> bool: ...  # noqa: D102


def is_sampled(path: Path) -> bool:
    """Tell whether a file has the columns of sampled images."""
    return path.suffix == ".parquet" and set(SOURCE_COLUMNS) <= set(open_parquet(path).schema_arrow.names)


def check_sampled(images: Path) -> None:
    """Refuse a file that lacks a column of sampled images.

    Raises:
        UserError: see above.
    """
    found = open_parquet(images).schema_arrow.names
    lacking = [name for name in SOURCE_COLUMNS if name not in found]
    if lacking:
        raise missing_columns(str(images), lacking, found, "; give what `mmalign pairs sample` wrote")


def sampled_prompts(images: Path) -> list[str]:
    """Return the distinct prompts of sampled images, in their order.

    Raises:
        UserError: `images` lacks a column.
    """
    check_sampled(images)
    batches = (batch.column(0).to_pylist() for batch in iterate_columns(images, ("prompt",)))
    return list(dict.fromkeys(text for batch in batches for text in batch))


def sampled_pictures(images: Path) -> Iterator[Picture]:
    """Yield sampled images in their order."""
    started = [name for name in open_parquet(images).schema_arrow.names if name == "first_frame"]
    reader = ForwardReader(images, (*SOURCE_COLUMNS, *started))
    for row in (reader.row(index) for index in range(len(reader))):
        uid = f"{row['prompt_id']}-{row['seed']:016x}"
        first = row.get("first_frame")
        yield Picture(row["prompt_id"], uid, row["prompt"], row["image"], row["model"], first_frame=first)


def pictures_of_pairs(
    pairs: Iterable[Pair], first_frame: Callable[[int], bytes | Path | None] = lambda index: None
) -> Iterator[Picture]:
    """Yield both pictures of every pair, the chosen one first; `first_frame` gives that of a pair by its number."""
    for index, pair in enumerate(pairs):
        first = first_frame(index)
        for side, media in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            preferred = None if pair.tie else side == "chosen"
            uid = f"{pair.id}/{side}"
            yield Picture(pair.id, uid, pair.prompt, media, pair=pair.id, chosen=preferred, first_frame=first)


def holds_pictures(folder: Path) -> bool:
    """Tell whether a folder holds images of one's own: image files, and not the two sides of pairs."""
    sides = any(is_dir(folder / one) and is_dir(folder / other) for one, other in (("chosen", "rejected"), ("w", "l")))
    return not sides and any(_is_image(path) for path in visible(folder, "**/*"))


def own_pictures(source: str, default_prompt: str | None = None, *, folder_prompts: bool = False) -> list[Picture]:
    """Return the pictures of a folder (or table, or tar), those of one prompt together.

    A prompt comes from metadata or a text file beside the picture, else from `prompt.txt` in its folder, else from the
    folder's name (with `folder_prompts`), else it is `default_prompt`.

    Raises:
        UserError: `source` holds no pictures, or one of them has no prompt.
    """
    pictures: dict[str, list[Picture]] = {}
    texts: dict[Path, str | None] = {}
    faulty: list[Item] = []
    for item in find_items([source], "image").items:
        prompt = item.prompt
        if prompt is None and isinstance(item.media, Path):
            folder = item.media.parent
            if folder not in texts:
                texts[folder] = _prompt_of_folder(folder)
            named = folder.name if folder_prompts and folder.absolute() != Path(source).absolute() else None
            prompt = texts[folder] or named
        prompt = default_prompt if prompt is None else prompt
        if item.fault:
            faulty.append(item)
        elif prompt is None:
            raise UserError(
                f"{item.name}: has no prompt; give metadata.jsonl, NAME.txt, prompt.txt in its folder, "
                "--folder-prompts or --prompt TEXT"
            )
        else:
            pictures.setdefault(prompt, []).append(Picture(content_key(prompt)[:16], item.name, prompt, item.media))
    if faulty:
        note(f"{len(faulty)} pictures left out, the first: {faulty[0].name}: {faulty[0].fault}")
    return [_under(source, picture) for held in pictures.values() for picture in held]


def distinct_prompts(pictures: Sequence[Picture]) -> list[str]:
    """Return the prompts of pictures, each once."""
    return list(dict.fromkeys(picture.prompt for picture in pictures))


def _under(source: str, picture: Picture) -> Picture:
    """Return a picture whose name does not change with the place of its folder."""
    return replace(picture, uid=picture.uid.removeprefix(source).lstrip("/#"))


def _prompt_of_folder(folder: Path) -> str | None:
    if any(_is_image(path) for path in visible(folder, f"{FOLDER_PROMPT}.*")):
        return None  # then the text belongs to that picture
    files = [folder / f"{FOLDER_PROMPT}{suffix}" for suffix in SIDECAR_SUFFIXES]
    return next((read_sidecar(path) for path in files if is_file(path)), None)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and is_file(path)
