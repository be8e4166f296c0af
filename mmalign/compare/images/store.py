"""The images or videos of one system: files with a manifest, generated only where the manifest does not list them.

    <folder>/0007-1.png         prompt 7 (counted from 0), seed 1; .mkv of a video
    <folder>/manifest.json      the key of each image

An image is used again if and only if its key is unchanged: a hash of the model's fingerprint, the sampling settings,
the prompt and the seed. An interrupted comparison therefore continues, and a changed one generates only the images
that changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mmalign.compare.images.media import IMAGES, ImageMedia
from mmalign.core.files import write_atomically
from mmalign.core.progress import track
from mmalign.core.seeds import derive_seed

FORMAT = 2


@dataclass(frozen=True)
class Sampling:
    """The sampling settings that change images, apart from model, prompt and seed."""

    steps: int
    guidance: float
    solver: str = "ddim"
    precision: str = "fp32"
    adapter_scale: float = 1.0
    image_size: int | None = None
    video: dict[str, int | float] | None = None
    """the geometry of videos, as far as it was chosen"""

    def identity(self) -> dict[str, Any]:
        """Return the settings for manifests and keys; an adapter scale and sizes without effect are left out."""
        values = asdict(self)
        if self.adapter_scale == 1:
            del values["adapter_scale"]
        if self.image_size is None:
            del values["image_size"]
        if not self.video:
            del values["video"]
        return values


class Images(Protocol):
    """The images, or videos, of one system over prompts and seeds, wherever they come from."""

    prompts: list[str]
    seeds: list[int]
    media: ImageMedia

    def path(self, index: int, seed: int) -> Path:
        """Return the path of the image of a prompt and a seed."""
        ...


class ImageStore:
    """The images, or videos, of one system over prompts and seeds."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        sampling: Sampling,
        prompts: Sequence[str],
        seeds: Sequence[int],
        media: ImageMedia = IMAGES,
    ) -> None:
        """Open the store; nothing is written before the first image."""
        self.folder, self.fingerprint, self.sampling = folder, fingerprint, sampling
        self.prompts, self.seeds, self.media = list(prompts), list(seeds), media
        self._known: dict[str, str] = _read_manifest(folder / "manifest.json")
        self._unsaved = 0

    def path(self, index: int, seed: int) -> Path:
        """Return the path of the image of a prompt and a seed."""
        return self.folder / f"{index:04d}-{seed}.{self.media.suffix}"

    def key(self, index: int, seed: int) -> str:
        """Return the hash of everything that determines the image."""
        made_from = [FORMAT, self.fingerprint, self.sampling.identity(), self.prompts[index], seed]
        return hashlib.blake2b(json.dumps(made_from).encode(), digest_size=16).hexdigest()

    def missing(self) -> dict[int, list[int]]:
        """Return for each incomplete prompt the seeds whose image is missing or has another key."""
        rows = {i: [seed for seed in self.seeds if not self._has(i, seed)] for i in range(len(self.prompts))}
        return {index: seeds for index, seeds in rows.items() if seeds}

    def put(self, index: int, seed: int, data: bytes) -> None:
        """Write one image; the manifest follows every few images, or every video, and with `save`."""
        write_atomically(self.path(index, seed), data)
        self._known[self.path(index, seed).name] = self.key(index, seed)
        self._unsaved += 1
        if self._unsaved >= self.media.noted_after:
            self.save()

    def disown(self, missing: dict[int, list[int]]) -> None:
        """Drop images to be replaced from the manifest, so that no image keeps a wrong key if the run is killed."""
        for name in (self.path(index, seed).name for index, seeds in missing.items() for seed in seeds):
            self._unsaved += self._known.pop(name, None) is not None
        self.save()

    def adopt(self, other: ImageStore) -> None:
        """Copy from another store the missing images with the same key."""
        missing = self.missing()
        self.disown(missing)
        for index, seeds in missing.items():
            for seed in seeds:
                if other.prompts[index] == self.prompts[index] and other.key(index, seed) == self.key(index, seed):
                    if other._has(index, seed):
                        self.put(index, seed, other.path(index, seed).read_bytes())
        self.save()

    def save(self) -> None:
        """Write the manifest."""
        if not self._unsaved:
            return
        document: dict[str, Any] = {"format": FORMAT, "fingerprint": self.fingerprint, **self.sampling.identity()}
        document["images"] = dict(sorted(self._known.items()))
        write_atomically(self.folder / "manifest.json", json.dumps(document, indent=1))
        self._unsaved = 0

    def _has(self, index: int, seed: int) -> bool:
        path = self.path(index, seed)
        return self._known.get(path.name) == self.key(index, seed) and path.is_file()


def noise_seed(seed: int, prompt: str) -> int:
    """Return the seed of the initial noise that every system starts a prompt from.

    It differs from prompt to prompt: were the noise of a seed shared by all prompts, a comparison would be about one
    or two noises, and intervals over prompts would not know.
    """
    return derive_seed("compare", seed, prompt) % 2**32


def draw_missing(store: ImageStore, open_generator: Callable[[], Any], *, batch_size: int, label: str) -> int:
    """Generate the missing images of a store and return their number; the model is loaded only if some are missing."""
    missing = store.missing()
    wanted = sum(map(len, missing.values()))
    if not wanted:
        return 0
    from mmalign.data.building.generation import generate_images

    store.disown(missing)
    cells = [(index, seed) for index, seeds in missing.items() for seed in seeds]
    total = len(store.prompts) * len(store.seeds)
    with track(total, label, unit=f"{store.media.modality}s", initial=total - wanted) as job:
        generator = open_generator()
        images = generate_images(
            generator,
            [store.prompts[index] for index in missing],
            seeds=[[noise_seed(seed, store.prompts[index]) for seed in seeds] for index, seeds in missing.items()],
            steps=store.sampling.steps,
            guidance=store.sampling.guidance,
            solver=store.sampling.solver,
            batch_size=batch_size,
            progress=job.advance,
        )
        try:
            for (index, seed), drawn in zip(cells, images, strict=True):
                store.put(index, seed, store.media.encode(drawn.image, getattr(generator, "fps", None)))
        finally:
            store.save()
    return wanted


def _read_manifest(path: Path) -> dict[str, str]:
    """Return image name -> key; a manifest of another format, or a damaged one, counts as empty."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    images = document.get("images") if isinstance(document, dict) and document.get("format") == FORMAT else None
    return images if isinstance(images, dict) else {}
