"""First frames for models that make videos of one: which image it is, encoded once, and its part of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key
from mmalign.core.io.images import Media, open_image, read_bytes
from mmalign.data.encoded.encoders import ReadMedia, VideoEncoder
from mmalign.data.encoded.store import Rows, TensorStore
from mmalign.data.encoded.transforms import Decision, VideoTransform
from mmalign.data.vlm_pairs import media_digest

AGREE = 8.0
"""First frames of a pair whose mean absolute difference is at most this, in levels of 0 to 255, are one image.

Videos in MP4 files are not what was written, so that one image in two files differs a little.
"""


@dataclass(frozen=True)
class FirstFrames:
    """What the model is given of the first frame of each sample; `slots[sample, flip]` number the encodings."""

    rows: Rows
    keys: list[str]
    slots: Int[Tensor, "samples flips"]
    kept: bool
    """Whether the encoding stands in the place of the first latents of the videos."""

    def take(self, samples: Int[Tensor, " batch"], flips: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """Return the fields of a `Conditioning`."""
        return self.rows[self.slots[samples, flips]]


class FirstFrameEncoder:
    """Chooses the first frame of each sample and encodes those that the store lacks.

    An encoding is known by the content of the videos, or of the image given, and by the geometry.
    """

    def __init__(self, folder: Path, generator: Any, videos: VideoEncoder | None = None) -> None:
        """Open the store of this generator; `videos` reads the videos, if any, and keeps their first frames."""
        geometry = "x".join(map(str, generator.media_shape))
        self._transform = VideoTransform(*generator.media_shape[2:]) if videos is None else videos.transform
        self._flips = (False,) if videos is None else videos.flips
        self._identity = f"{generator.vae_id}:{generator.dtype}:{type(generator).__name__}:{geometry}"
        self._store = TensorStore(folder / f"first-frames-{content_key(self._identity)[:16]}")
        self._generator, self._videos = generator, videos
        self._keys = dict[str, int]()

    def add(self, name: str, given: Media | None, decision: Decision, sides: Sequence[ReadMedia] = ()) -> list[int]:
        """Return the slot of each flip of a sample: the image given, or else the first frame of its videos.

        Raises:
            UserError: the image cannot be read, or the videos start differently; `name` is that of the sample.
        """
        if given is None:
            keys = [content_key(self._identity, *flip) for flip in zip(*(side.keys for side in sides), strict=True)]
        else:
            made_by = (_digest(given, name), self._identity, repr(decision))
            keys = [content_key(*made_by, int(flip)) for flip in self._flips]
        if any(key not in self._store for key in keys):
            called = f"{name}, first frame"
            given_frame = None if given is None else read_frame(given, self._transform, decision, called)
            pixels = self._shared(name, sides) if given_frame is None else given_frame
            for key, flip in zip(keys, self._flips, strict=True):
                self._encode(key, pixels.flip(-1) if flip else pixels)
        return [self._keys.setdefault(key, len(self._keys)) for key in keys]

    def finish(self, slots: Sequence[Sequence[int]], memory_limit: int) -> FirstFrames:
        """Return the encodings; `slots` are what `add` returned for each sample."""
        self._store.flush()
        keys = list(self._keys)
        numbers = torch.tensor(slots, dtype=torch.long).reshape(len(slots), len(self._flips))
        return FirstFrames(self._store.rows(keys, memory_limit), keys, numbers, self._generator.keeps_first_frame)

    def _shared(self, name: str, sides: Sequence[ReadMedia]) -> UInt8[Tensor, "3 height width"]:
        assert self._videos is not None, "prompts are given their images"
        first, *others = (self._videos.first_frame(side) for side in sides)
        for other in others:
            difference = float((first.float() - other.float()).abs().mean())
            if difference > AGREE:
                raise UserError(
                    f"{name}: the first frames of its sides differ by {difference:.1f} levels of 255 on average (at "
                    f"most {AGREE:g}), and the model makes videos of one; give it in a column first_frame, or give "
                    "videos that share it"
                )
        return first

    def _encode(self, key: str, pixels: UInt8[Tensor, "3 height width"]) -> None:
        encoded = self._generator.encode_first_frames(pixels.unsqueeze(0).float() / 255)
        self._store.add(key, {name: tensor[0] for name, tensor in encoded.items()})


def read_frame(
    media: Media, transform: VideoTransform, decision: Decision, name: str
) -> UInt8[Tensor, "3 height width"]:
    """Return an image as 8-bit levels of the size of a model's frames; `name` is what errors call it.

    Raises:
        UserError: it cannot be read.
    """
    levels = torch.from_numpy(np.array(open_image(read_bytes(media, name), name))).permute(2, 0, 1)
    return transform(levels.unsqueeze(0), decision)[0]


def starts_from_image(generator: Any, data: DataConfig) -> bool:
    """Tell whether the videos that a generator learns from start from an image each."""
    needed, possible = (bool(getattr(generator, f"{word}_first_frame", False)) for word in ("needs", "takes"))
    return needed if data.first_frame is None else data.first_frame and possible


def _digest(media: Media, name: str) -> str:
    try:
        return media_digest(media)
    except OSError as error:
        raise UserError(f"{name}, first frame: '{media!s}' cannot be read ({error.strerror})") from None
