"""Media to 8-bit tensors: images by PIL, videos from PIL animations, folders of frames, or containers by PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageSequence, features
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.files import visible
from mmalign.core.io.items import Slice, bytes_or_file
from rewards.combining.on_frames import evenly
from rewards.media import image_levels


def _image_suffixes() -> frozenset[str]:
    """Return the suffixes of images that this Pillow reads; AVIF, HEIC and JPEG 2000 where it can."""
    if find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
    optional = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k", ".jpx")}
    found = [suffix for name, suffixes in optional.items() if features.check(name) for suffix in suffixes]
    always = ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .tga".split()
    return frozenset([*always, *found, *([".heic", ".heif"] if find_spec("pillow_heif") else [])])


IMAGE_SUFFIXES = _image_suffixes()
CONTAINER_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
VIDEO_SUFFIXES = CONTAINER_SUFFIXES | {".gif"}
SUFFIXES = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
MAX_VIDEO_PIXELS = 2 << 30
"""Frames times width times height beyond which a video is refused unless `frames` or `fps` thin it out."""


class Chooser(Protocol):
    """A rule for which frames of a video are taken."""

    def choose(self, total: int, rate: float | None) -> list[int]:
        """Return the numbers of the frames taken, rising, of `total` at `rate` frames a second (None: unknown)."""
        ...


@dataclass(frozen=True)
class Frames:
    """Which frames of a video are scored: `count` spread evenly over it, or `fps` a second; all without either."""

    count: int | None = None
    fps: float | None = None

    def choose(self, total: int, rate: float | None) -> list[int]:
        """Return the indices of the frames taken, of `total` at `rate` frames a second (None: unknown).

        Raises:
            UserError: `fps` is set and the frames have no rate.
        """
        if self.count is not None:
            return evenly(total, self.count)
        if self.fps is not None:
            if not rate:
                raise UserError("its frames have no rate; use --frames in place of --fps (in a config, data.frames)")
            step = max(rate / self.fps, 1.0)
            return [int(index * step) for index in range(int((total - 1) / step) + 1)]
        return list(range(total))


ALL_FRAMES = Frames()


def decode(media: bytes | Path | Slice, modality: str, frames: Frames = ALL_FRAMES) -> Tensor:
    """Return an image `[3, H, W]` or a video `[F, 3, H, W]` as uint8, upright RGB.

    Raises:
        UserError, RewardError, OSError: it cannot be read; PIL and PyAV raise errors of their own besides.
    """
    data = bytes_or_file(media)
    if modality == "video":
        return decode_video(data, frames)[0]
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return image_levels(image).contiguous()


def decode_video(
    data: bytes | Path, frames: Chooser = ALL_FRAMES, rate: float | None = None
) -> tuple[Tensor, float | None]:
    """Return the selected frames of a video, as `decode` does, and their rate (frames a second).

    `rate` is that of all its frames, for videos that do not state it (or state it wrongly); the returned one is None
    where it is unknown.

    Raises:
        UserError, RewardError, OSError: it cannot be read; PIL and PyAV raise errors of their own besides.
    """
    if isinstance(data, Path) and data.is_dir():
        return _from_folder(data, frames, rate)
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as animation:
            return _from_animation(animation, frames, rate)
    except Image.UnidentifiedImageError:
        return _from_container(data, frames, rate)


def _thinned(rate: float | None, taken: list[int]) -> float | None:
    """Return the rate of the frames taken, of all frames at `rate`."""
    return rate if rate is None or len(taken) < 2 else rate * (len(taken) - 1) / (taken[-1] - taken[0])


def _from_folder(folder: Path, frames: Chooser, rate: float | None) -> tuple[Tensor, float | None]:
    files = [path for path in visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError("the folder holds no frames")
    wanted = frames.choose(len(files), rate)
    return _stack([decode(files[index], "image") for index in wanted]), _thinned(rate, wanted)


def _from_animation(animation: Image.Image, frames: Chooser, rate: float | None) -> tuple[Tensor, float | None]:
    total = getattr(animation, "n_frames", 1)
    seconds = sum(frame.info.get("duration", 0) for frame in ImageSequence.Iterator(animation)) / 1000
    rate = rate or (total / seconds if seconds else None)
    wanted = frames.choose(total, rate)
    _check_size(len(wanted), animation.width, animation.height)
    levels = []
    for index in wanted:
        animation.seek(index)
        levels.append(image_levels(animation).contiguous())
    return _stack(levels), _thinned(rate, wanted)


def _from_container(data: bytes | Path, frames: Chooser, rate: float | None) -> tuple[Tensor, float | None]:
    try:
        import av
    except ImportError:
        raise UserError('reading video files needs PyAV: pip install "mmalign[video]"') from None
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data), mode="r") as container:
        if not container.streams.video:
            raise UserError("holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = rate or (float(stream.average_rate) if stream.average_rate else None)
        if frames == ALL_FRAMES:
            return _stack(_take(container.decode(stream), None)[0]), rate
        # Containers often state no number of frames, or a wrong one. Packets are counted without decoding; where they
        # are not one a frame, the number of decoded frames is taken, and the video is decoded once more.
        total = sum(packet.size > 0 for packet in container.demux(stream))
        container.seek(0)
        taken, decoded = _take(container.decode(stream), frames.choose(total, rate))
        wanted = frames.choose(decoded, rate)
        if decoded != total:
            container.seek(0)
            taken, _ = _take(container.decode(stream), wanted)
        return _stack(taken), _thinned(rate, wanted)


def _take(decoded: Iterator[Any], wanted: list[int] | None) -> tuple[list[Tensor], int]:
    """Return the frames of these numbers (None: all), and how many frames there are."""
    chosen = None if wanted is None else set(wanted)
    taken: list[Tensor] = []
    count = 0
    for frame in decoded:
        if chosen is None or count in chosen:
            _check_size(len(taken) + 1, frame.width, frame.height)
            taken.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous())
        count += 1
    return taken, count


def _stack(levels: list[Tensor]) -> Tensor:
    if not levels:
        raise UserError("holds no frame")
    shapes = {tuple(frame.shape) for frame in levels}
    if len(shapes) > 1:
        raise UserError("its frames differ in size")
    return torch.stack(levels)


def _check_size(frames: int, width: int, height: int) -> None:
    if frames * width * height > MAX_VIDEO_PIXELS:
        raise UserError(f"{frames} frames of {width}x{height} are too many at once; take fewer with --frames or --fps")
