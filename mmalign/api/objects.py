"""Python objects as a configuration and its files take them: classes by name, data as parquet named by its content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.files import expand, write_atomically
from mmalign.core.hashing import content_key
from mmalign.core.io.columns import missing_columns
from mmalign.core.io.images import encode_png, read_bytes
from mmalign.core.io.parquet import atomic_parquet
from mmalign.core.registry import dotted_path, methods

if TYPE_CHECKING:
    from rewards import Reward

FOLDER = "data"
"""Where objects are written, within the output."""
_TEXT, _IMAGE, _NUMBER = pa.string(), pa.binary(), pa.float64()


def plain(value: Any, where: str = "the config") -> Any:
    """Return a value as YAML could hold it: a path as text, a method or reward class by its name, all the way down.

    Raises:
        UserError: it is an object that no file could hold, such as a reward that is made already.
    """
    from mmalign.methods.base import Method
    from rewards import Reward

    if isinstance(value, Mapping):
        return {str(key): plain(one, f"{where}: {key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, where) for one in value]
    if isinstance(value, type) and issubclass(value, Method):
        return methods.name_of(value)
    if isinstance(value, type) and issubclass(value, Reward):
        return reward_name(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | int | float | None):
        return value
    if hasattr(value, "__fspath__"):
        return os.fspath(value)
    if isinstance(value, Reward):
        raise UserError(
            f"{where}: a run must be repeatable from its config, which cannot hold a reward that is made already; "
            f"give the class, and its options beside it: {{'name': {type(value).__name__}, 'options': {{...}}}}"
        )
    raise UserError(f"{where}: a {type(value).__name__} cannot stand in a config; give numbers, text, lists, mappings")


def reward_name(reward: type[Reward]) -> str:
    """Return how a configuration names a reward class: by its name, by its dotted path, or else registered here.

    Raises:
        RewardError: it has no name, or another reward goes by it.
    """
    from rewards import RewardError, register, reward_class

    try:
        if reward_class(reward.name) is reward:
            return reward.name
    except RewardError:
        pass
    return dotted_path(reward) or register(reward).name


def write_prompts(prompts: Iterable[Any], output: Path) -> str:
    """Write prompts, text or {"prompt", "category"}, as JSONL named by their content; return its path.

    Raises:
        UserError: there are none, or one is no text.
    """
    rows = [{"prompt": one} if isinstance(one, str) else one for one in prompts]
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
            raise UserError(f"prompts: number {number} is {row!r}; give text, or a mapping with 'prompt'")
    if not rows:
        raise UserError("prompts: none are given")
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    path = output / FOLDER / f"prompts-{content_key(text)}.jsonl"
    write_atomically(path, text)
    return str(path)


class Columns(NamedTuple):
    """How rows are written: columns that each must have, those it may have, the names they get, and what is added."""

    required: dict[str, pa.DataType]
    optional: dict[str, pa.DataType]
    written: dict[str, str] = {}
    added: dict[str, float] = {}


_PAIRS = Columns(
    {"prompt": _TEXT, "chosen": _IMAGE, "rejected": _IMAGE},
    {"id": _TEXT, "score_chosen": _NUMBER, "score_rejected": _NUMBER},
    {
        "prompt": "caption",
        "chosen": "jpg_0",
        "rejected": "jpg_1",
        "score_chosen": "score_0",
        "score_rejected": "score_1",
    },
    {"label_0": 1.0, "label_1": 0.0},
)
_PICK_A_PIC = Columns(
    {"caption": _TEXT, "jpg_0": _IMAGE, "jpg_1": _IMAGE, "label_0": _NUMBER, "label_1": _NUMBER},
    {"score_0": _NUMBER, "score_1": _NUMBER, "id": _TEXT, "ranking_id": _TEXT},
)
_LABELS = Columns(
    {"prompt": _TEXT, "image": _IMAGE, "label": _TEXT}, {"id": _TEXT, "caption_rejected": _TEXT}, {"prompt": "caption"}
)
_IMAGES = pa.list_(_IMAGE)
_ANSWERS = Columns(
    {"prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT},
    {
        **{"image": _IMAGE, "images": _IMAGES, "rejected_image": _IMAGES, "video": _TEXT, "rejected_video": _TEXT},
        **{"id": _TEXT, "aspect": _TEXT, "fps": _NUMBER, "margin": _NUMBER, "difficulty": _NUMBER},
    },
)


def write_pairs(rows: Iterable[Mapping[str, Any]], output: Path, *, answers: bool = False) -> str:
    """Write pairs of images, or of answers about media, as parquet named by its content, and return its path.

    rows: dictionaries, or a `datasets.Dataset`: `prompt`, `chosen`, `rejected` (images: PIL, paths, bytes, arrays
    `[H, W, 3]` of 8 bits, or tensors `[3, H, W]` in [0, 1]), optional `id`, `score_chosen` and `score_rejected`; or
    the columns of Pick-a-Pic. Pairs of answers: texts, and `image`, `images` or `video` (a path, or a list of frames).

    Raises:
        UserError: a row lacks a column or holds something else; there are no rows.
    """
    return _write(
        rows, "pairs", output, lambda row: _ANSWERS if answers else _PICK_A_PIC if "jpg_0" in row else _PAIRS
    )


def write_labels(rows: Iterable[Mapping[str, Any]], output: Path) -> str:
    """Write images that are good or bad, as `write_pairs` does: `prompt`, `image`, `label` (good or bad, a bool).

    Raises:
        UserError: see `write_pairs`.
    """
    return _write(rows, "labels", output, lambda row: _LABELS)


def _write(
    rows: Iterable[Mapping[str, Any]],
    kind: str,
    output: Path,
    choose: Callable[[Mapping[str, Any]], Columns],
) -> str:
    iterator = iter(rows)
    first = next(iterator, None)
    if not isinstance(first, Mapping):
        found = "none are given" if first is None else f"a row is a {type(first).__name__}"
        raise UserError(f"{kind}: {found}; give dictionaries, or a datasets.Dataset")
    columns = choose(first)
    folder, keys = output / FOLDER, list[str]()
    types = {**columns.required, **columns.optional}
    given = {name for row in rows for name in row} if isinstance(rows, list | tuple) else first.keys()
    used = [name for name in types if name in columns.required or name in given]
    names = [(columns.written.get(name, name), types[name]) for name in used]
    schema = pa.schema([*names, *((name, _NUMBER) for name in columns.added)])
    unnamed = folder / f".{kind}.{os.getpid()}.parquet"  # of this process alone: all processes of a run come here
    with atomic_parquet(unnamed, schema, {}) as writer:
        for number, row in enumerate(chain([first], iterator)):
            where = f"{kind}: row {number}"
            cells = {name: _cell(row, name, types[name], where, columns, folder) for name in used}
            keys.append(content_key(*(cell if isinstance(cell, bytes) else repr(cell) for cell in cells.values())))
            writer.add({columns.written.get(name, name): cell for name, cell in cells.items()} | columns.added)
    path = folder / f"{kind}-{content_key(*schema.names, *keys)}.parquet"
    unnamed.replace(path)
    return str(path)


def _cell(row: Mapping[str, Any], name: str, kind: pa.DataType, where: str, columns: Columns, folder: Path) -> Any:
    if name not in row and name in columns.required:
        lacking = [column for column in columns.required if column not in row]
        raise missing_columns(where, lacking, row)
    value, place = row.get(name), f"{where}, {name}"
    if value is None:
        if name in columns.required:
            raise UserError(f"{place}: is missing")
        return None
    if kind == _NUMBER:
        return float(value)
    if kind == _IMAGE:
        return image_bytes(value, place)
    if kind == _IMAGES:
        return [image_bytes(one, place) for one in (value if isinstance(value, list | tuple) else [value])]
    if name in ("video", "rejected_video"):
        return _video(value, place, folder)
    if isinstance(value, bool | np.bool_ | int) and name == "label":
        return "good" if value else "bad"
    if not isinstance(value, str) and name not in ("id", "ranking_id"):
        raise UserError(f"{place}: a {type(value).__name__}; give text")
    return str(value)


def image_bytes(value: Any, name: str) -> bytes:
    """Return an image as the bytes of a file: those of a path, or PNG.

    value: PIL image, path, bytes, {"bytes", "path"} of `datasets`, 8-bit array `[H, W, 3]`, tensor `[3, H, W]` in
    [0, 1]. name: what an error calls it.

    Raises:
        UserError: it is none of these, or the file cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return read_bytes(expand(value), name)
    if isinstance(value, Image.Image):
        return encode_png(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return encode_png(Image.fromarray(value))
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
        return encode_png(value)
    raise UserError(
        f"{name}: no image (a {type(value).__name__}); give a PIL image, a path, bytes, a uint8 array [H, W, 3] or a "
        "tensor [3, H, W] in [0, 1]"
    )


def _video(value: Any, name: str, folder: Path) -> str:
    """Return the path of a video; frames are written to a folder that is named by their content."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        path = expand(value).resolve()
        if not path.exists():
            raise UserError(f"{name}: {path} does not exist")
        return str(path)
    if not isinstance(value, Sequence | Tensor | np.ndarray) or len(value) == 0:
        raise UserError(f"{name}: no video (a {type(value).__name__}); give a path, or a list of frames")
    frames = [image_bytes(frame, f"{name}, frame {index}") for index, frame in enumerate(value)]
    place = (folder / f"frames-{content_key(*frames)}").resolve()
    for index, frame in enumerate(frames):
        write_atomically(place / f"{index:05d}.png", frame)
    return str(place)
