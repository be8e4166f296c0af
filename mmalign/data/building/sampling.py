"""Sample several images or videos for each prompt into one parquet file, which an interrupted run completes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key
from mmalign.core.io.images import encode_png
from mmalign.core.io.parquet import ForwardReader, atomic_parquet, iterate_columns, read_metadata
from mmalign.core.io.video_files import encode_video
from mmalign.core.lock import locked_output
from mmalign.core.progress import note, track
from mmalign.core.seeds import derive_seed
from mmalign.data.building.generation import GeneratedImage, generate_images
from mmalign.data.building.real_media import (
    RealMedium,
    StartReader,
    Unusable,
    drawn_strength,
    medium_id,
)
from mmalign.data.prompts import Prompt
from mmalign.data.vlm_pairs import media_digest

IMAGES_FILE = "images.parquet"
PARTS_FOLDER = "parts"
PART_ROWS = 256
PART_SECONDS = 60.0

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("category", pa.string()),
        ("prompt_id", pa.string()),
        ("seed", pa.int64()),
        ("image", pa.binary()),
        ("model", pa.string()),
    ]
)
FROM_REAL = (pa.field("source", pa.string()), pa.field("strength", pa.float64()))
"""Columns of images that started from real media."""
FIRST_FRAME = pa.field("first_frame", pa.binary())
"""A further column, of videos that start from an image each."""
Key = tuple[str, int]
"""(prompt_id, seed): the key of an image in its file."""


@dataclass(frozen=True)
class SampleSettings:
    """Everything that determines the images besides prompt and seed; their seeds derive from `seed`.

    `fingerprint` identifies the model's content (and an extra adapter's), so that a retrained model of the same name
    is told from the old one; `model` is its name, for readers. `flow` names what was chosen for a flow model;
    `image_size` is the side of the images in pixels where it is not the model's own; `video` is the geometry of videos
    where it is not. `strength` bounds the noise of images that start from real media, a share of the levels drawn for
    each medium; `first_frames` is True where videos start from the images of their prompts.
    """

    model: str
    fingerprint: str
    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    solver: str = "ddim"
    precision: str = "fp32"
    adapter_scale: float = 1.0
    seed: int = 0
    flow: str | None = None
    image_size: int | None = None
    video: str | None = None
    strength: tuple[float, float] | None = None
    first_frames: bool | None = None

    @property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        fields = (FROM_REAL if self.strength is not None else ()) + ((FIRST_FRAME,) if self.first_frames else ())
        return pa.schema([*SCHEMA, *fields])


@dataclass(frozen=True)
class SampleCounts:
    """The number of images in all, and of those made by this call; `unusable` real media are left out."""

    prompts: int
    repeated_prompts: int
    images: int
    new: int
    unusable: int = 0


def prompt_id(prompt: str | Prompt) -> str:
    """Return 16 hexadecimal digits that identify a prompt, with its real medium or first frame, everywhere."""
    if isinstance(prompt, RealMedium):
        return medium_id(prompt)
    if isinstance(prompt, str):
        return content_key(prompt)[:16]
    return content_key(prompt.text, *([] if prompt.first_frame is None else [media_digest(prompt.first_frame)]))[:16]


def sample_images(
    open_generator: Callable[[], Any],
    prompts: Sequence[Prompt],
    out: Path,
    settings: SampleSettings,
    *,
    images_per_prompt: int = 4,
    batch_size: int = 8,
    unusable: Unusable | None = None,
) -> SampleCounts:
    """Complete `out/images.parquet`: `images_per_prompt` images for each distinct prompt, grouped by prompt.

    Columns: prompt, category, prompt_id, seed, image (PNG; of a video model MP4), model, and with
    `settings.first_frames` first_frame; the settings are in the file's metadata. Finished
    parts are kept in `out/parts` until all are there, so an interrupted call can be resumed, and a call with more
    prompts or images adds to the finished ones. `open_generator` is called only if an image is missing.

    Where `settings` have a strength, the prompts are `RealMedium`, the images of each start from it, and `source` and
    the `strength` drawn for it are columns too. A medium that cannot be read is left out and added to `unusable`.

    Raises:
        UserError: `out` holds images made with other settings, another process writes there, images_per_prompt is
            not positive, or no real medium can be used.
    """
    if images_per_prompt < 1:
        raise UserError(f"images_per_prompt {images_per_prompt}: must be at least 1")
    with locked_output(out):
        return _complete(open_generator, prompts, out, settings, images_per_prompt, batch_size, unusable or Unusable())


def _complete(
    open_generator: Callable[[], Any],
    prompts: Sequence[Prompt],
    out: Path,
    settings: SampleSettings,
    images_per_prompt: int,
    batch_size: int,
    unusable: Unusable,
) -> SampleCounts:
    unique: dict[str, Prompt] = {}
    if not settings.first_frames:
        prompts = [replace(prompt, first_frame=None) for prompt in prompts]
    for prompt in prompts:
        unique.setdefault(prompt_id(prompt), prompt)
    wanted = {
        name: [derive_seed(settings.seed, "image", prompt.text, number) for number in range(images_per_prompt)]
        for name, prompt in unique.items()
    }
    files = _existing_files(out, settings)
    places = _index(files)
    missing = {name: [seed for seed in seeds if (name, seed) not in places] for name, seeds in wanted.items()}
    todo = [(unique[name], seeds) for name, seeds in missing.items() if seeds]
    new = sum(len(seeds) for _, seeds in todo)
    total = images_per_prompt * len(wanted)
    lacking, known = 0, unusable.count
    if todo:
        with track(total, "sample", initial=total - new) as job:
            generator = open_generator()
            bounds = settings.strength
            reader = None if bounds is None else StartReader(generator, settings.seed, bounds, unusable)
            lacking = new - _generate_parts(
                generator, todo, out / PARTS_FOLDER, settings, batch_size, reader, job.advance
            )
        if reader is not None and (changes := reader.report()):
            note(changes)
    if (out / PARTS_FOLDER).is_dir():
        _merge(out, wanted, settings)
    if lacking and lacking == total:
        raise UserError(f"{out}: none of {unusable.count} real images or videos can be used")
    used = len(wanted) - (unusable.count - known)
    return SampleCounts(used, len(prompts) - len(unique), total - lacking, new - lacking, unusable.count)


def _existing_files(out: Path, settings: SampleSettings) -> list[Path]:
    """Return the finished file and the parts, after checking that they were made with the same settings."""
    finished = [out / IMAGES_FILE] if (out / IMAGES_FILE).is_file() else []
    files = [*finished, *sorted((out / PARTS_FOLDER).glob("*.parquet"))]
    asked = _identity(asdict(settings))
    for path in files:
        found = _identity(read_metadata(path).get("settings", {}))
        different = [f"{name} {found.get(name)} -> {asked[name]}" for name in asked if found.get(name) != asked[name]]
        if different:
            raise UserError(
                f"{path} was made with other settings ({', '.join(different)}); choose another --out, or remove it"
            )
    return files


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {name: value for name, value in plain.items() if name != "model"}


def _index(files: Sequence[Path]) -> dict[Key, tuple[Path, int]]:
    """Return where each image lies: file and row."""
    places: dict[Key, tuple[Path, int]] = {}
    for path in files:
        row = 0
        for batch in iterate_columns(path, ("prompt_id", "seed")):
            for key in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                places.setdefault(key, (path, row))
                row += 1
    return places


def _generate_parts(
    generator: Any,
    todo: Sequence[tuple[Prompt, list[int]]],
    folder: Path,
    settings: SampleSettings,
    batch_size: int,
    reader: StartReader | None,
    progress: Callable[[int], None],
) -> int:
    """Make the missing images and write a part every few hundred of them, or every minute; return their number."""
    images = generate_images(
        generator,
        [prompt for prompt, _ in todo],
        seeds=[seeds for _, seeds in todo],
        steps=settings.steps,
        guidance=settings.guidance,
        eta=settings.eta,
        solver=settings.solver,
        batch_size=batch_size,
        start=None if reader is None else lambda index: reader(todo[index][0]),
        progress=progress,
    )
    made = 0
    rows: list[dict[str, Any]] = []
    written = time.monotonic()
    try:
        for item in images:
            rows.append(_row(todo[item.prompt_index][0], item, settings, getattr(generator, "fps", None)))
            made += 1
            if len(rows) >= PART_ROWS or time.monotonic() - written > PART_SECONDS:
                _write_part(folder, rows, settings)
                rows, written = [], time.monotonic()
    finally:  # finished images are kept on Ctrl-C too
        if rows:
            _write_part(folder, rows, settings)
    return made


def _row(prompt: Prompt, item: GeneratedImage, settings: SampleSettings, fps: float | None) -> dict[str, Any]:
    made = item.image
    real = {}
    if isinstance(prompt, RealMedium) and settings.strength is not None:
        strength = drawn_strength(prompt, settings.seed, settings.strength)
        real = {"source": prompt.name, "strength": strength}
    return {
        "prompt": prompt.text,
        "category": prompt.category,
        "prompt_id": prompt_id(prompt),
        "seed": item.seed,
        "image": encode_png(made) if fps is None else encode_video(made, fps),
        "model": settings.model,
        "first_frame": None if prompt.first_frame is None else prompt.first_frame.read_bytes(),
        **real,
    }


def _write_part(folder: Path, rows: Sequence[Mapping[str, Any]], settings: SampleSettings) -> None:
    taken = [int(path.stem) for path in folder.glob("*.parquet") if path.stem.isdigit()]
    with atomic_parquet(
        folder / f"{max(taken, default=-1) + 1:06d}.parquet", settings.schema, _metadata(settings)
    ) as part:
        for row in rows:
            part.add(row)


def _metadata(settings: SampleSettings) -> dict[str, Any]:
    return {"settings": asdict(settings)}


def _merge(out: Path, wanted: Mapping[str, Sequence[int]], settings: SampleSettings) -> None:
    """Write the finished file anew from itself and the parts, grouped by prompt, and remove the parts."""
    files = _existing_files(out, settings)
    places = _index(files)
    groups: dict[str, dict[int, None]] = {}
    finished = (key for key, (path, _) in places.items() if path.name == IMAGES_FILE)
    asked = ((name, seed) for name, seeds in wanted.items() for seed in seeds if (name, seed) in places)
    for name, seed in (*finished, *asked, *places):
        groups.setdefault(name, {})[seed] = None
    readers = {path: ForwardReader(path, settings.schema.names) for path in files}
    with atomic_parquet(out / IMAGES_FILE, settings.schema, _metadata(settings)) as target:
        for key in _flatten(groups):
            path, row = places[key]
            target.add(readers[path].row(row))
    shutil.rmtree(out / PARTS_FOLDER)


def _flatten(groups: Mapping[str, Mapping[int, None]]) -> Iterator[Key]:
    return ((name, seed) for name, seeds in groups.items() for seed in seeds)
