"""Media to latents, each distinct one once: what identifies an encoding, how it is read, and the store it goes to."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.errors import LONGEST_PATH, UserError, shorten
from mmalign.core.hashing import content_key
from mmalign.core.io.clips import SAME_RATE, ClipRule, ClipSource, clip_changes, read_clip
from mmalign.core.io.images import Media, image_size, open_image, read_bytes
from mmalign.data.encoded.store import Rows, TensorStore
from mmalign.data.encoded.transforms import Decision, PairTransform, VideoTransform
from mmalign.data.vlm_pairs import media_digest

MOST_WORKERS = 4
SAME_SHAPE = 0.02
"""Sides of a pair whose aspect ratios differ by less than this share show the same part of the scene."""


@dataclass
class ReadMedia:
    """Media read for encoding: a key for each flip, and the tensors of those keys that the store lacked."""

    keys: list[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    source: Tensor | None = None
    """What the file of a video holds, as `ClipSource`."""
    first: Tensor | None = None
    """The first frame of a video as 8-bit levels, where it is wanted."""

    def facts(self) -> dict[str, Tensor]:
        """Return what the store keeps beside the encoding."""
        found = {"source": self.source, "first": self.first}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class MediaEncoder(ABC):
    """Numbers the distinct encodings that the records need and encodes those that the store lacks, in batches."""

    ahead = 0
    """How many records are read ahead of the one that is encoded."""

    def __init__(self, folder: Path, generator: Any, batch_size: int, data: DataConfig, *, beside: str = "") -> None:
        """Open the store of this generator's autoencoder in the cache; `beside` names what else its rows hold."""
        self.keys: list[str] = []
        self.flips = (False, True) if data.flip else (False,)
        self._slots: dict[str, int] = {}
        self._identity = f"{generator.vae_id}:{generator.dtype}{beside}"
        self._store = TensorStore(folder / f"latents-{content_key(self._identity)[:16]}")
        self._generator, self._batch_size = generator, batch_size
        self._batch: dict[str, dict[str, Tensor]] = {}

    @abstractmethod
    def decide(self, name: str) -> Decision:
        """Return the crop of a record."""

    @abstractmethod
    def read(self, media: Media, decision: Decision, name: str, fps: float) -> ReadMedia:
        """Return the keys of media, decoded if an encoding is missing; `name` is that of its record in errors."""

    def begin(self, media: Media, decision: Decision, name: str, fps: float) -> Callable[[], ReadMedia]:
        """Begin to read; the result waits for it, or raises its error."""
        return partial(self.read, media, decision, name, fps)

    def check(self, name: str, sides: Sequence[ReadMedia]) -> None:  # noqa: B027 (a hook)
        """Raise a UserError for sides that cannot be compared."""

    def add_sides(self, sides: Sequence[ReadMedia]) -> list[int]:
        """Return the slot of each flip of each side of a record that is kept."""
        return [slot for media in sides for slot in self.add(media)]

    def add(self, media: ReadMedia) -> list[int]:
        """Return the slot of each flip; encodes when a batch is full."""
        for key in media.keys:
            if key in self._slots:
                continue
            if key in media.tensors and key not in self._store:
                self._batch[key] = {"media": media.tensors[key], **media.facts()}
            self._slots[key] = len(self.keys)
            self.keys.append(key)
        media.tensors = {}
        if len(self._batch) >= self._batch_size:
            self._encode()
        return [self._slots[key] for key in media.keys]

    def finish(self, memory_limit: int) -> Rows:
        """Encode the last media and return all rows by slot."""
        self._encode()
        self._store.flush()
        return self._store.rows(self.keys, memory_limit)

    def fields(self) -> Mapping[str, Any]:
        """Return further fields of `CachedSides`."""
        return {}

    def report(self, name: str) -> str:
        """Return how the media of a table were changed to fit the model; empty where they were not."""
        return ""

    @torch.no_grad()
    def _encode(self) -> None:
        if not self._batch:
            return
        media = torch.stack([row["media"] for row in self._batch.values()]).to(self._generator.device)
        if media.dtype == torch.uint8:
            media = media.float().div_(255)
        mean, std = self._generator.encode_posterior(media)
        # AutoencoderTiny has no posterior; rows of zeros would double the cache for nothing.
        parts = {"mean": mean, "std": std} if bool(std.any()) else {"mean": mean}
        for index, (key, row) in enumerate(self._batch.items()):
            facts = {name: value for name, value in row.items() if name != "media"}
            self._store.add(key, {**{name: tensor[index] for name, tensor in parts.items()}, **facts})
        self._batch = {}


class ImageEncoder(MediaEncoder):
    """Encodes images, cropped to a square."""

    def __init__(self, folder: Path, generator: Any, batch_size: int, data: DataConfig) -> None:
        """See `MediaEncoder`; `data` gives `resolution` (None: the generator's own), `crop` and `flip`."""
        super().__init__(folder, generator, batch_size, data)
        self.transform = PairTransform(data.resolution or generator.image_size, data.crop)

    def decide(self, name: str) -> Decision:
        """Return the crop of a record."""
        return self.transform.decide(name)

    def read(self, media: Media, decision: Decision, name: str, fps: float) -> ReadMedia:
        """Return the keys of an image; it is decoded only if an encoding is missing."""
        data = read_bytes(media, name)
        # An image is identified by its content, so that neither equal file names on the two sides of a pair nor a
        # replaced file matter; the crop counts where it changes the result.
        crop = self.transform.plan(image_size(data, name), decision)
        made_by = (self._identity, self.transform.resolution, *crop)
        keys = [content_key(data, *made_by, int(flip)) for flip in self.flips]
        missing = [key not in self._slots and key not in self._store for key in keys]
        found = ReadMedia(keys)
        if any(missing):
            image = open_image(data, name)
            wanted = [(key, flip) for key, flip, lacks in zip(keys, self.flips, missing, strict=True) if lacks]
            found.tensors = {key: self.transform(image, decision, flip=flip) for key, flip in wanted}
        return found


class VideoEncoder(MediaEncoder):
    """Encodes videos of the model's size, number of frames and rate; worker threads decode each file once."""

    def __init__(self, folder: Path, generator: Any, data: DataConfig, *, first_frames: bool = False) -> None:
        """See `MediaEncoder`; `data` gives `crop` and `flip`, the generator the geometry.

        With `first_frames` the store keeps the first frame of each video too, for `first_frame`.
        """
        super().__init__(folder, generator, 1, data, beside=":first frames" if first_frames else "")
        self._first_frames = first_frames
        frames, _, height, width = generator.media_shape
        self.transform = VideoTransform(height, width, data.crop)
        self.rule = ClipRule(frames, generator.fps)
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        self.ahead = workers + 1
        self._pool = ThreadPoolExecutor(workers, "decode")
        self._begun: dict[Any, Future[ReadMedia]] = {}
        self._sources: dict[str, Tensor] = {}
        self._rates: list[float] = []

    def decide(self, name: str) -> Decision:
        """Return the crop of a record."""
        return self.transform.decide(name)

    def begin(self, media: Media, decision: Decision, name: str, fps: float) -> Callable[[], ReadMedia]:
        """Begin to read in a worker; a file that is read already is not read again."""
        key = (media, decision, None if math.isnan(fps) else fps)
        if key not in self._begun:
            self._begun[key] = self._pool.submit(self.read, media, decision, name, fps)
        begun = self._begun[key]
        while len(self._begun) > 4 * self.ahead:  # a file that comes again later is known by its content
            del self._begun[next(iter(self._begun))]
        return begun.result

    def read(self, media: Media, decision: Decision, name: str, fps: float) -> ReadMedia:
        """Return the keys of a video, its frames of the model's size as 8-bit levels where an encoding is missing."""
        given = None if math.isnan(fps) else fps
        try:
            digest = media_digest(media)
            geometry = f"{self.rule.frames}x{self.transform.height}x{self.transform.width}@{self.rule.fps}"
            made_by = (self._identity, geometry, repr(decision), repr(given))
            keys = [content_key(digest, *made_by, int(flip)) for flip in self.flips]
            found = ReadMedia(keys)
            if keys[0] in self._sources:
                found.source = self._sources[keys[0]]
                return found
            if all(key in self._store for key in keys):
                found.source = self._store.value(keys[0], "source")
                return found
            levels, source = read_clip(media, self.rule, given)
        except Exception as error:  # PIL and PyAV raise anything from OSError to their own types
            place = "its bytes" if isinstance(media, bytes) else shorten(str(media), LONGEST_PATH)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name}: video {place} cannot be used ({reason})") from None
        found.source = torch.tensor(
            [source.frames, math.nan if source.fps is None else source.fps, source.width, source.height],
            dtype=torch.float64,
        )
        fitted = self.transform(levels, decision)
        found.first = fitted[0] if self._first_frames else None
        found.tensors = {key: fitted.flip(-1) if flip else fitted for key, flip in zip(keys, self.flips, strict=True)}
        return found

    def check(self, name: str, sides: Sequence[ReadMedia]) -> None:
        """Refuse sides that play at different speeds or show different parts of the scene.

        Raises:
            UserError: says how they differ.
        """
        sources = [_source(side.source) for side in sides]
        rates = [self._rate(source) for source in sources]
        if max(rates) > min(rates) * (1 + SAME_RATE):
            listed = " and ".join(f"{rate:g}" for rate in rates)
            raise UserError(
                f"{name}: its sides would play at {listed} frames a second, and what moves faster would be learned "
                f"from; give clips of one rate, or of at least {self.rule.fps:g}, the model's"
            )
        shapes = [source.width / source.height for source in sources]
        if max(shapes) > min(shapes) * (1 + SAME_SHAPE):
            listed = " and ".join(f"{source.width}x{source.height}" for source in sources)
            raise UserError(
                f"{name}: its sides are {listed}, and would be cropped to different parts of the scene; give clips of "
                "one shape"
            )

    def first_frame(self, media: ReadMedia) -> Tensor:
        """Return the first frame of a video, of the model's size and not flipped, as 8-bit levels."""
        return self._store.value(media.keys[0], "first") if media.first is None else media.first

    def add_sides(self, sides: Sequence[ReadMedia]) -> list[int]:
        """Return the slot of each flip of each side, and remember the rate at which they are taken."""
        self._rates.append(self._rate(_source(sides[0].source)))
        return super().add_sides(sides)

    def add(self, media: ReadMedia) -> list[int]:
        """Return the slot of each flip, and remember what the file holds."""
        assert media.source is not None
        self._sources[media.keys[0]] = media.source  # before it is in the store, which workers look in next
        return super().add(media)

    def fields(self) -> Mapping[str, Any]:
        """Return the rate at which each record's clips are taken."""
        return {"rates": torch.tensor(self._rates, dtype=torch.float64)}

    def finish(self, memory_limit: int) -> Rows:
        """Encode the last videos and return all rows by slot."""
        self._pool.shutdown()
        return super().finish(memory_limit)

    def report(self, name: str) -> str:
        """Return how many clips lost frames or changed their speed."""
        changed = clip_changes(map(_source, self._sources.values()), self.rule)
        taken = f"{self.rule.frames} frames of {self.transform.height}x{self.transform.width}"
        return f"{name}: {len(self._sources)} clips taken as {taken}: {', '.join(changed)}" if changed else ""

    def _rate(self, source: ClipSource) -> float:
        rate = source.fps or self.rule.fps or 1.0
        return rate / self.rule.step(rate)


def _source(facts: Tensor | None) -> ClipSource:
    assert facts is not None, "every video that was read says what its file holds"
    frames, fps, width, height = facts.tolist()
    return ClipSource(int(frames), None if math.isnan(fps) else fps, int(width), int(height))
