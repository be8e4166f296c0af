"""Real images or videos that samples start from, as in DenseDPO (arXiv 2506.03517): captions, levels, latents.

The samples of a medium share its motion, since all start from it noised to one level (`pipelines.sdedit`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key, uniform
from mmalign.core.io.clips import ClipRule, ClipSource, clip_changes, read_clip
from mmalign.core.io.images import open_image, read_bytes
from mmalign.core.io.items import Item, Media, bytes_or_file
from mmalign.core.progress import note
from mmalign.data.encoded.transforms import Decision, PairTransform, VideoTransform
from mmalign.data.prompts import Prompt
from mmalign.data.vlm_pairs import media_digest

SHOWN_FAULTS = 5
"""Media that cannot be used that are named; all are counted."""


@dataclass(frozen=True)
class RealMedium(Prompt):
    """A caption with the real image or video that it describes; `digest` identifies its content."""

    name: str = ""
    media: Media = b""
    digest: str = ""


class Start(NamedTuple):
    """Where the samples of a prompt start: clean latents ``[*latent]``, and how much noise they get, in 0..1."""

    latents: Float[Tensor, " *latent"]
    strength: float


@dataclass
class Unusable:
    """Counts media that cannot be used, and names the first of them."""

    count: int = 0

    def add(self, name: str, reason: str | Exception) -> None:
        """Count one."""
        if self.count < SHOWN_FAULTS:
            words = " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(reason).__name__
            note(f"{name}: {words.removeprefix(f'{name}: ')}; left out")
        self.count += 1


def real_media(items: Iterable[Item], unusable: Unusable, limit: int | None = None) -> list[RealMedium]:
    """Return the items that have a caption and can be opened, `limit` of them at most; `unusable` counts the others.

    Raises:
        UserError: none is left.
    """
    found: list[RealMedium] = []
    for item in items:
        if limit is not None and len(found) >= limit:
            break
        if item.fault or not (item.prompt or "").strip():
            unusable.add(item.name, item.fault or "has no caption: give metadata.jsonl, or NAME.txt beside it")
            continue
        try:
            digest = media_digest(bytes_or_file(item.media))
        except Exception as error:  # a damaged archive or table raises anything
            unusable.add(item.name, error)
            continue
        assert item.prompt is not None
        found.append(RealMedium(item.prompt, name=item.name, media=item.media, digest=digest))
    if not found:
        raise UserError(f"--from: none of {unusable.count} images or videos can be used")
    return found


def medium_id(medium: RealMedium) -> str:
    """Return 16 hexadecimal digits that identify a medium with its caption."""
    return content_key(medium.text, medium.digest)[:16]


def drawn_strength(medium: RealMedium, seed: int, bounds: tuple[float, float]) -> float:
    """Return the strength that all samples of a medium share, uniform in `bounds`; it depends on seed and medium."""
    low, high = bounds
    return low + (high - low) * uniform(seed, "strength", medium_id(medium))


class StartReader:
    """Reads and encodes real media as training does: frames at the model's rate, resized to cover it, cropped."""

    def __init__(self, generator: Any, seed: int, bounds: tuple[float, float], unusable: Unusable) -> None:
        """Take the geometry of a model of the families, and what `drawn_strength` takes.

        `unusable` counts media that cannot be read or are too short.
        """
        self._generator, self._seed, self._bounds, self._unusable = generator, seed, bounds, unusable
        self._video = generator.modality == "video"
        shape = generator.media_shape if self._video else (1, 3, *[generator.image_size] * 2)
        self._rule, self._side = ClipRule(shape[0], getattr(generator, "fps", None)), shape[2:]
        self._sources: list[ClipSource] = []

    def __call__(self, medium: Prompt) -> Start | None:
        """Return where the samples of a `RealMedium` start; None, counted, for one that cannot be used."""
        assert isinstance(medium, RealMedium), "images with a strength start from real media"
        try:
            media = (self._read_video if self._video else self._read_image)(bytes_or_file(medium.media), medium.name)
        except Exception as error:  # decoders of untrusted bytes raise anything
            self._unusable.add(medium.name, error)
            return None
        with torch.no_grad():
            latents = self._generator.encode(media[None])[0]
        return Start(latents, drawn_strength(medium, self._seed, self._bounds))

    def report(self) -> str:
        """Return how media were changed to fit the model; empty where none was."""
        height, width = self._side
        resized = sum((source.height, source.width) != self._side for source in self._sources)
        changes = [f"{resized} resized"] if resized else []
        kind, taken = "images", f"{height}x{width}"
        if self._video:
            changes += clip_changes(self._sources, self._rule)
            kind, taken = "clips", f"{self._rule.frames} frames of {taken}"
        return f"{len(self._sources)} real {kind} taken as {taken}: {', '.join(changes)}" if changes else ""

    def _read_video(self, media: bytes | Path, name: str) -> Tensor:
        levels, source = read_clip(media, self._rule)
        self._sources.append(source)
        return VideoTransform(*self._side)(levels, Decision()).float() / 255

    def _read_image(self, media: bytes | Path, name: str) -> Tensor:
        image = open_image(read_bytes(media, name), name)
        self._sources.append(ClipSource(1, None, *image.size))
        return PairTransform(self._side[0])(image, Decision())
