"""A set of Shapes videos with their questions on disk: video files, `videos.parquet`, `questions.parquet`.

`videos.parquet` holds the scene graph of every video, so that answers can be checked, or read again for perturbed
frames, without the generator. Families are kept whole: a video always comes with its conflicting twins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.io.parquet import atomic_parquet, iterate_columns
from mmalign.core.io.video_files import CODECS, write_video
from mmalign.core.progress import track
from mmalign.core.seeds import derive_seed
from mmalign.shapes.questions import ShapesQuestion, ask
from mmalign.shapes.twins import SPLITS, Family, sample_families
from mmalign.shapes.video import MAX_FRAMES, MAX_SIZE, MIN_FRAMES, MIN_SIZE, Actor, VideoScene, render

VIDEOS, QUESTIONS = "videos.parquet", "questions.parquet"

_TEXT = pa.string()
_VIDEO_SCHEMA = pa.schema(
    {"video": _TEXT, "file_name": _TEXT, "family": _TEXT, "topic": _TEXT, "value": _TEXT, "split": _TEXT,
     "held_out": pa.bool_(), "scene": _TEXT}
)  # fmt: skip
_QUESTION_SCHEMA = pa.schema(
    {"id": _TEXT, "video": _TEXT, "file_name": _TEXT, "aspect": _TEXT, "topic": _TEXT, "format": _TEXT,
     "text": _TEXT, "prompt": _TEXT, "answer": _TEXT, "group": _TEXT, "held_out": pa.bool_(), "member": pa.int32(),
     "subject": pa.list_(_TEXT), "names": pa.list_(_TEXT), "answers": _TEXT}
)  # fmt: skip


@dataclass(frozen=True)
class VideoRow:
    """One video of a set: its id, its file, its scene, and whether it shows a held-out combination."""

    video: str
    file: Path
    scene: VideoScene
    held_out: bool


def check_request(count: int, split: str, frames: str, size: int, suffix: str, fps: float) -> list[int]:
    """Check a user's options before any work; return the lengths to draw from, given as "8" or "8,12,16".

    Raises:
        UserError: an option is out of range or unknown.
    """
    if count < 1:
        raise UserError(f"--count {count}: must be 1 or more")
    if split not in SPLITS:
        raise UserError(f"--split '{split}': {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    if suffix not in CODECS:
        raise UserError(f"--format '{suffix}': {' or '.join(CODECS)}{did_you_mean(suffix, CODECS)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"--size {size}: must be {MIN_SIZE} to {MAX_SIZE}")
    if not fps > 0:
        raise UserError(f"--fps {fps}: must be above 0")
    lengths = [int(word) if word.strip().isdigit() else 0 for word in frames.split(",")]
    if not all(MIN_FRAMES <= length <= MAX_FRAMES for length in lengths):
        raise UserError(f"--frames '{frames}': one or more numbers from {MIN_FRAMES} to {MAX_FRAMES}, such as 8,12")
    return lengths


def write_video_set(
    folder: Path,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    frames: Sequence[int] = (8,),
    size: int = 48,
    suffix: str = "mkv",
    fps: float = 4.0,
    scramble: bool = False,
) -> tuple[int, int]:
    """Write at least `count` videos, families whole, with all their questions; return the numbers of both.

    The same arguments write the same bytes. `frames` are the lengths to draw from. `scramble` puts the frames of every
    video in random order and leaves scenes, questions and answers as they are: these answers cannot be known.
    """
    made = {"split": split, "seed": seed, "frames": list(frames), "size": size, "fps": fps, "scramble": scramble}
    videos_file = atomic_parquet(folder / VIDEOS, _VIDEO_SCHEMA, made)
    questions_file = atomic_parquet(folder / QUESTIONS, _QUESTION_SCHEMA, made)
    with videos_file as videos, questions_file as questions, track(None, "draw videos", "videos") as job:
        for name, family in _named_families(count, split, seed, frames, size):
            files = [f"videos/{name}-{member}.{suffix}" for member in range(len(family.scenes))]
            for member, (file, scene) in enumerate(zip(files, family.scenes, strict=True)):
                video = render(scene)
                if scramble:
                    video = video[np.random.default_rng(derive_seed(seed, "scramble", file)).permutation(len(video))]
                write_video(folder / file, video, fps)
                videos.add(_video_row(name, member, file, family, split))
            for question in ask(family, name, seed):
                questions.add(_question_row(question, files[question.member], family.held_out))
            job.advance(len(files))
        return videos.count, questions.count


def _named_families(
    count: int, split: str, seed: int, frames: Sequence[int], size: int
) -> Iterator[tuple[str, Family]]:
    """Families, topics in turn, until they hold `count` videos."""
    drawn = 0
    families = sample_families(count, split, seed, frames=frames, size=size)
    for number, family in enumerate(families):
        if drawn >= count:
            return
        drawn += len(family.scenes)
        yield f"{split}-{number:05d}-{family.topic}", family


def _video_row(name: str, member: int, file: str, family: Family, split: str) -> dict[str, Any]:
    scene = json.dumps(asdict(family.scenes[member]))
    return {
        "video": f"{name}-{member}", "file_name": file, "family": name, "topic": family.topic, "split": split,
        "value": family.values[member], "held_out": family.held_out, "scene": scene,
    }  # fmt: skip


def _question_row(question: ShapesQuestion, file: str, held_out: bool) -> dict[str, Any]:
    row = asdict(question) | {"prompt": question.prompt, "file_name": file, "held_out": held_out}
    return row | {"answers": json.dumps(question.answers)}


def read_videos(folder: Path) -> list[VideoRow]:
    """Read the videos of a set with their scene graphs.

    Raises:
        UserError: the folder holds no such set.
    """
    columns = ("video", "file_name", "scene", "held_out")
    return [
        VideoRow(row["video"], folder / row["file_name"], _scene(row["scene"]), row["held_out"])
        for row in _rows(folder / VIDEOS, columns)
    ]


def read_questions(folder: Path) -> list[ShapesQuestion]:
    """Read the questions of a set, ready to be answered again for other frames.

    Raises:
        UserError: the folder holds no such set.
    """
    columns = list(ShapesQuestion.__dataclass_fields__)
    questions = []
    for row in _rows(folder / QUESTIONS, columns):
        row["answers"] = tuple((value, answer) for value, answer in json.loads(row["answers"]))
        row["subject"], row["names"] = tuple(row["subject"]), tuple(row["names"])
        questions.append(ShapesQuestion(**row))
    return questions


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path}: not here; `mmalign shapes videos --out {path.parent}` writes it")
    for batch in iterate_columns(path, columns):
        yield from batch.to_pylist()


def _scene(text: str) -> VideoScene:
    fields = json.loads(text)
    actors = []
    for actor in fields.pop("actors"):
        shown = actor.pop("shown")
        actors.append(Actor(**actor, shown=None if shown is None else tuple((a, b) for a, b in shown)))
    return VideoScene(actors=tuple(actors), **fields)
