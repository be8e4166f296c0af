"""The folder that `mmalign generate` fills: images or videos, their metadata, and the settings they were made with."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically

if TYPE_CHECKING:
    from mmalign.data.prompts import Prompt

METADATA_FILE = "metadata.jsonl"
SETTINGS_FILE = "generate.json"
GRID_ROWS, STRIP = 40, 8
"""The prompts that grids show, and the frames of a video on its contact sheet."""


class ImageFolder:
    """The output folder: its images, the settings they were made with, and the prompt of each image."""

    suffix, unit = "png", "images"
    rate: float | None = None
    """Frames a second of the videos that are put here."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Read the metadata of an earlier run; nothing is written."""
        self.path, self.prompts, self.seeds = path, list(prompts), list(seeds)
        self._rows = {row["file"]: row for row in _read_metadata(path / METADATA_FILE)}

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to mix images of different settings in one folder; store the settings of a new folder."""
        path = self.path / SETTINGS_FILE
        found = _read_settings(path)
        if not self._rows:  # an earlier attempt failed before its first image
            found = {}
        different = [
            f"{name} {found.get(name)} -> {value}"
            for name, value in settings.items()
            if name != "model" and found and found.get(name) != value
        ]
        for index, prompt in enumerate(self.prompts):
            for seed in self.seeds:
                row = self._rows.get(self.name(index, seed))
                if row is None or len(different) >= 3:
                    continue
                if row["prompt"] != prompt.text:
                    different.append(f"prompt {index} '{row['prompt']}' -> '{prompt.text}'")
                elif row.get("first_frame_id") != _identity(prompt).get("first_frame_id"):
                    different.append(f"first frame of prompt {index} {row.get('first_frame')} -> {prompt.first_frame}")
        if different:
            raise UserError(
                f"{self.path} holds images made with other settings ({', '.join(different)}); choose another --out "
                "or remove the folder"
            )
        write_atomically(path, json.dumps(settings, indent=2))

    def name(self, index: int, seed: int) -> str:
        """Return the name of the file of a prompt and a seed."""
        return f"{index:05d}-{seed}.{self.suffix}"

    def missing(self) -> dict[int, list[int]]:
        """Return prompt index -> seeds whose image is missing."""
        wanted = {
            index: [seed for seed in self.seeds if not self._has(self.name(index, seed))]
            for index in range(len(self.prompts))
        }
        return {index: seeds for index, seeds in wanted.items() if seeds}

    def put(self, index: int, seed: int, image: Any) -> None:
        """Write one image and its metadata, so that an interrupted run can be resumed."""
        prompt, name = self.prompts[index], self.name(index, seed)
        self._write(self.path / name, image)
        row = {"file": name, "prompt": prompt.text, "category": prompt.category, "seed": seed}
        self._rows[name] = row | _identity(prompt)
        with (self.path / METADATA_FILE).open("a", encoding="utf-8") as lines:
            lines.write(_line(self._rows[name]))

    def _write(self, path: Path, image: Any) -> None:
        from mmalign.core.io.images import encode_png

        write_atomically(path, encode_png(image))

    def write_metadata(self) -> None:
        """Rewrite the metadata in the order of the files."""
        text = "".join(_line(self._rows[name]) for name in sorted(self._rows, key=_index_and_seed))
        write_atomically(self.path / METADATA_FILE, text)

    def write_grid(self) -> Path:
        """Draw the images of the first prompts as one grid and return its path."""
        from PIL import Image

        from mmalign.core.io.grid import image_grid
        from mmalign.core.io.images import encode_png

        shown = self._shown()
        rows = [[Image.open(self.path / self.name(index, seed)) for seed in self.seeds] for index in shown]
        labels = [self.prompts[index].text for index in shown]
        picture = image_grid(rows, row_labels=labels, column_labels=[f"seed {seed}" for seed in self.seeds])
        write_atomically(self.path / "grid.png", encode_png(picture))
        return self.path / "grid.png"

    def _shown(self) -> range:
        return range(min(len(self.prompts), GRID_ROWS))

    def _has(self, name: str) -> bool:
        return name in self._rows and (self.path / name).is_file()


class VideoFolder(ImageFolder):
    """The same of videos, as MP4 files."""

    suffix, unit = "mp4", "videos"

    def _write(self, path: Path, video: Any) -> None:
        from mmalign.core.io.video_files import write_video

        assert self.rate is not None
        write_video(path, (video * 255).round().byte(), float(self.rate))

    def write_grid(self) -> Path:
        """Draw a few frames of each video of the first prompts, one video a row, and return the picture's path."""
        from mmalign.core.io.decode import Frames, decode
        from mmalign.core.io.grid import frame_strips
        from mmalign.core.io.images import encode_png

        jobs = [(index, seed) for index in self._shown() for seed in self.seeds]
        videos = [decode(self.path / self.name(*job), "video", Frames(STRIP)).float() / 255 for job in jobs]
        labels = [f"{self.prompts[index].text} (seed {seed})" for index, seed in jobs]
        write_atomically(self.path / "frames.png", encode_png(frame_strips(videos, labels, frames=STRIP)))
        return self.path / "frames.png"


def _identity(prompt: Prompt) -> dict[str, str]:
    """Return the file and the content of the image that the videos of a prompt start from, if there is one."""
    if prompt.first_frame is None:
        return {}
    from mmalign.data.vlm_pairs import media_digest

    return {"first_frame": str(prompt.first_frame), "first_frame_id": media_digest(prompt.first_frame)}


def _index_and_seed(name: str) -> tuple[int, int]:
    index, _, seed = Path(name).stem.partition("-")
    return int(index), int(seed)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    """Return the metadata of an earlier run; a line cut off by a crash is dropped, and its image is made again.

    Raises:
        UserError: another program wrote the file, which must not be overwritten.
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not _is_note(row):
            raise UserError(f"{path}: line {number} was not written by `mmalign generate`; choose another --out")
        rows.append(row)
    return rows


def _is_note(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and re.fullmatch(r"\d+-\d+\.(png|mp4)", str(row.get("file"))) is not None
        and isinstance(row.get("prompt"), str)
    )


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings with which the images of a folder were made; empty for a new folder.

    Raises:
        UserError: the file is damaged.
    """
    try:
        settings = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: damaged; remove the folder or choose another --out")
    return settings


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; choose another --out") from None
