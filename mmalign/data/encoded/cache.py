"""Stored preferences encoded once: image latents and prompt embeddings on disk, pairs returned as `PairBatch`.

Each unique image and prompt is encoded once, even if samples share it or a later run has more of them. The mean and
the standard deviation of the posterior are stored rather than a sample, so every epoch draws anew; the empty prompt
is stored too, for caption dropout. Afterwards the encoders are not needed any more (`generator.free_encoders()`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.files import expand
from mmalign.core.hashing import content_key, uniform
from mmalign.core.io.images import Media, image_size, open_image, read_bytes
from mmalign.core.progress import note
from mmalign.core.seeds import derive_seed
from mmalign.data.batches import PairBatch
from mmalign.data.encoded.store import MEMORY_LIMIT, Rows, TensorStore
from mmalign.data.encoded.transforms import Decision, PairTransform
from mmalign.data.pairs import PairRecord, PairTable
from pipelines.conditioning import Conditioning

SHOWN_FAULTS = 20
RecordT = TypeVar("RecordT", covariant=True)


def default_cache_dir() -> Path:
    """Return the default folder of encoded data: `~/.cache/mmalign`."""
    return Path.home() / ".cache" / "mmalign"


def build_pair_cache(
    table: PairTable,
    generator: Any,
    data: DataConfig,
    progress: Callable[[int], None] | None = None,
    *,
    batch_size: int = 16,
    memory_limit: int = MEMORY_LIMIT,
) -> CachedPairs:
    """Encode what the cache does not hold yet and return the pairs ready for training.

    The arguments are those of `encode_table`.

    Raises:
        UserError: an image cannot be read; the message names the pair and the side. See `encode_table`.
    """
    encoded = encode_table(table, pair_sides, generator, data, progress, batch_size, memory_limit)
    margins = torch.tensor(table.margins(), dtype=torch.float32)[encoded["kept"]]
    return CachedPairs(
        **encoded,
        margins=None if bool(margins.isnan().all()) else margins,
    )


def pair_sides(record: PairRecord) -> dict[str, Media]:
    """Return the two images of a pair under the names that an error calls them by."""
    return {f"pair '{record.id}', chosen": record.chosen, f"pair '{record.id}', rejected": record.rejected}


class Table(Protocol[RecordT]):
    """Records in order, each with an id, images and a prompt; `prompts` holds each prompt once."""

    name: str
    ids: list[str]
    prompts: list[str]

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __getitem__(self, index: int) -> RecordT:
        """Return a record, its images encoded bytes or paths; cheapest forwards."""
        ...

    def prompt_index(self, index: int) -> int:
        """Return where the prompt of a record stands in `prompts`."""
        ...


def encode_table(
    table: Table[RecordT],
    sides: Callable[[RecordT], Mapping[str, Media]],
    generator: Any,
    data: DataConfig,
    progress: Callable[[int], None] | None = None,
    batch_size: int = 16,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, Any]:
    """Encode the prompts and images that the cache does not hold yet and return the fields of `CachedImages`.

    `sides` returns the images of a record under the names that an error calls them by. `data` gives `resolution`
    (None: the generator's own), `crop`, `flip` and `caption_dropout`. `progress` is called with the number of records
    newly done. Up to `memory_limit` bytes of latents, and as many of embeddings, are kept in memory; more is
    memory-mapped. An interrupted call loses at most the last shard.

    With `data.on_bad: skip` a record with an image that cannot be read is left out, named and counted.

    Raises:
        UserError: an image cannot be read; with `skip`: no record is left.
    """
    prompts = PromptEncoder(cache_folder(data), generator, batch_size).encode(table.prompts, memory_limit)
    encoded = encode_sides(table, sides, generator, data, progress, batch_size, memory_limit)
    return {
        "prompts": prompts,
        "prompt_slots": torch.tensor([table.prompt_index(index) for index in encoded["kept"].tolist()]),
        "empty_slot": len(table.prompts),
        "caption_dropout": data.caption_dropout,
        **encoded,
    }


def encode_sides(
    table: Table[RecordT],
    sides: Callable[[RecordT], Mapping[str, Media]],
    generator: Any,
    data: DataConfig,
    progress: Callable[[int], None] | None = None,
    batch_size: int = 16,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, Any]:
    """Encode the images alone, as `encode_table` does, and return the fields of `CachedSides`."""
    transform = PairTransform(data.resolution or generator.image_size, data.crop)
    flips = (False, True) if data.flip else (False,)
    images = _ImageEncoder(cache_folder(data), generator, transform, batch_size, flips)
    slots, kept, faults = array("q"), list[int](), list[str]()
    for index, name in enumerate(table.ids):
        decision = transform.decide(name)
        try:
            record = table[index]
            named = [(f"{table.name}: {where}", media) for where, media in sides(record).items()]
            added = [images.add(media, decision, where) for where, media in named]
        except UserError as error:
            if data.on_bad == "error":
                raise UserError(f"{error}; data.on_bad=skip leaves such records out") from None
            faults.append(str(error))
        else:
            kept.append(index)
            slots.extend(slot for side in added for slot in side)
        if progress is not None:
            progress(1)
    _report(faults, len(table))
    return {
        "kept": torch.tensor(kept, dtype=torch.long),
        "ids": [table.ids[index] for index in kept],
        "latents": images.finish(memory_limit),
        "latent_keys": images.keys,
        "slots": torch.tensor(slots, dtype=torch.long).reshape(len(kept), -1, len(images.flips)),
        "resolution": transform.resolution,
    }


def _report(faults: Sequence[str], count: int) -> None:
    """Say which records are left out, since an image of theirs cannot be read; raise where none is left."""
    if faults and len(faults) == count:
        raise UserError(f"{faults[0]}; none of {count} can be encoded")
    for fault in faults[:SHOWN_FAULTS]:
        note(f"left out: {fault}")
    if faults:
        note(f"{len(faults)} of {count} are left out of the training, since they cannot be encoded")


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of what is encoded or computed once."""
    return expand(data.cache or default_cache_dir())


@dataclass(kw_only=True)
class CachedSides:
    """Encoded images. Slots number the distinct encodings: `slots[sample, side, flip]`.

    What is random in a batch (posterior sample, flip, caption dropout) depends on (seed, id or image, epoch) alone,
    never on the rest of the batch; flip and dropout are drawn once per sample and hold for all its sides.
    """

    kept: Int[Tensor, " samples"]
    """The records of the table that could be encoded, in its order; ids, slots and prompts are theirs alone."""
    ids: list[str]
    latents: Rows
    latent_keys: list[str]
    slots: Int[Tensor, "samples sides flips"]
    resolution: int

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def facts(self, index: int) -> tuple[str | float, ...]:
        """Return the facts that identify a sample besides its id and prompt: the content of its images first."""
        return tuple(self.latent_keys[slot] for slot in self.slots[index, :, 0].tolist())

    def sides(self, indices: Sequence[int], epoch: int, seed: int) -> tuple[list[str], list[Tensor], Tensor]:
        """Return ids, the latents of each side, and the indices as a tensor, on the CPU in float32."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        ids = [self.ids[index] for index in rows.tolist()]
        flips = torch.tensor([self._flipped(name, epoch, seed) for name in ids], dtype=torch.long)
        sides = range(self.slots.shape[1])
        return ids, [self._draw(self.slots[rows, side, flips], epoch, seed) for side in sides], rows

    def _flipped(self, name: str, epoch: int, seed: int) -> bool:
        return self.slots.shape[2] == 2 and uniform(seed, "flip", name, epoch) < 0.5

    def _draw(self, slots: Int[Tensor, " batch"], epoch: int, seed: int) -> Float[Tensor, "batch *latent"]:
        """Return a sample of each image's posterior, from (seed, image, epoch); the mean without a variance."""
        rows = self.latents[slots]
        latents = rows["mean"].float()
        if "std" not in rows:
            return latents
        noise, source = torch.empty_like(latents), torch.Generator()
        for row, slot in zip(noise, slots.tolist(), strict=True):
            source.manual_seed(derive_seed(seed, "posterior", self.latent_keys[slot], epoch))
            torch.randn(row.shape, generator=source, out=row)
        return latents.addcmul_(rows["std"].float(), noise)


@dataclass(kw_only=True)
class CachedImages(CachedSides):
    """Encoded images and prompts."""

    prompts: Rows
    prompt_slots: Int[Tensor, " samples"]
    empty_slot: int
    caption_dropout: float = 0.0

    def _condition(self, slots: Int[Tensor, " batch"], ids: list[str], epoch: int, seed: int) -> Conditioning:
        dropped = torch.tensor([uniform(seed, "caption", name, epoch) < self.caption_dropout for name in ids])
        tensors = self.prompts[torch.where(dropped, self.empty_slot, slots)]
        if "time_ids" in tensors:
            # SDXL is conditioned on the size of the training images: one row a sample, which holds for all its sides.
            size = float(self.resolution)
            tensors["time_ids"][:] = torch.tensor([size, size, 0.0, 0.0, size, size])
        return Conditioning.from_tensors(tensors)


@dataclass(kw_only=True)
class CachedPairs(CachedImages):
    """Encoded pairs; side 0 is chosen, side 1 rejected."""

    margins: Float[Tensor, " pairs"] | None

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> PairBatch:
        """Return these pairs, in this order, on the CPU in float32 (embeddings in the dtype they were encoded in)."""
        ids, (chosen, rejected), rows = self.sides(indices, epoch, seed)
        return PairBatch(
            chosen=chosen,
            rejected=rejected,
            cond=self._condition(self.prompt_slots[rows], ids, epoch, seed),
            ids=ids,
            epoch=epoch,
            margins=None if self.margins is None else self.margins[rows],
        )

    def facts(self, index: int) -> tuple[str | float, ...]:
        """Return the content of both images and the margin, if the data have any."""
        margin = () if self.margins is None else (float(self.margins[index]),)
        return *super().facts(index), *margin


class PromptEncoder:
    """Encodes unique prompts, and the embedding for no prompt, into a store."""

    def __init__(self, folder: Path, generator: Any, batch_size: int) -> None:
        """Open the store of this generator's text encoders."""
        self._identity = f"{generator.text_id}:{generator.dtype}"
        self._store = TensorStore(folder / f"prompts-{content_key(self._identity)[:16]}")
        self._generator, self._batch_size = generator, batch_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], memory_limit: int) -> Rows:
        """Return a row for each prompt, and last the one for caption dropout.

        That is the family's unconditional embedding, which guidance will use: the encoded empty prompt, or for SDXL
        zeros where its pipeline takes zeros.
        """
        keys = [content_key(self._identity, "prompt", prompt) for prompt in prompts]
        empty = content_key(self._identity, "unconditional")
        if empty not in self._store:
            self._add([empty], self._generator.unconditional())
        missing = [(key, text) for key, text in zip(keys, prompts, strict=True) if key not in self._store]
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            self._add([key for key, _ in part], self._generator.encode_prompts([text for _, text in part]))
        self._store.flush()
        return self._store.rows([*keys, empty], memory_limit)

    def _add(self, keys: Sequence[str], encoded: Conditioning) -> None:
        for row, key in enumerate(keys):
            self._store.add(key, {name: tensor[row] for name, tensor in encoded.tensors().items()})


class _ImageEncoder:
    """Numbers the distinct encodings that the pairs need and encodes those that the store lacks, in batches."""

    def __init__(
        self, folder: Path, generator: Any, transform: PairTransform, batch_size: int, flips: tuple[bool, ...]
    ) -> None:
        self.keys: list[str] = []
        self.flips = flips
        self._slots: dict[str, int] = {}
        self._identity = f"{generator.vae_id}:{generator.dtype}"
        self._store = TensorStore(folder / f"latents-{content_key(self._identity)[:16]}")
        self._generator, self._transform, self._batch_size = generator, transform, batch_size
        self._batch: list[tuple[str, Tensor]] = []

    def add(self, media: Media, decision: Decision, name: str) -> list[int]:
        """Return the slot of an image, one for each flip; it is decoded only if an encoding is missing."""
        data = read_bytes(media, name)
        # An image is identified by its content, so that neither equal file names on the two sides of a pair nor a
        # replaced file matter; the crop counts where it changes the result.
        crop = self._transform.plan(image_size(data, name), decision)
        made_by = (self._identity, self._transform.resolution, *crop)
        keys = [content_key(data, *made_by, int(flip)) for flip in self.flips]
        fresh = [key for key in keys if key not in self._slots]
        missing = [key for key in fresh if key not in self._store]
        if missing:
            image = open_image(data, name)
            for key, flip in zip(keys, self.flips, strict=True):
                if key in missing:
                    self._batch.append((key, self._transform(image, decision, flip=flip)))
        for key in fresh:
            self._slots[key] = len(self.keys)
            self.keys.append(key)
        if len(self._batch) >= self._batch_size:
            self._encode()
        return [self._slots[key] for key in keys]

    def finish(self, memory_limit: int) -> Rows:
        """Encode the last images and return all rows by slot."""
        self._encode()
        self._store.flush()
        return self._store.rows(self.keys, memory_limit)

    @torch.no_grad()
    def _encode(self) -> None:
        if not self._batch:
            return
        media = torch.stack([tensor for _, tensor in self._batch]).to(self._generator.device)
        mean, std = self._generator.encode_posterior(media)
        # AutoencoderTiny has no posterior; rows of zeros would double the cache for nothing.
        parts = {"mean": mean, "std": std} if bool(std.any()) else {"mean": mean}
        for row, (key, _) in enumerate(self._batch):
            self._store.add(key, {name: tensor[row] for name, tensor in parts.items()})
        self._batch = []
