"""Stored preferences encoded once: image latents and prompt embeddings on disk, pairs returned as `PairBatch`.

Each unique image and prompt is encoded once, even if samples share it or a later run has more of them. The mean and
the standard deviation of the posterior are stored rather than a sample, so every epoch draws anew; the empty prompt
is stored too, for caption dropout. Afterwards the encoders are not needed any more (`generator.free_encoders()`).
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.files import expand
from mmalign.core.hashing import content_key, uniform
from mmalign.core.io.images import Media
from mmalign.core.progress import note
from mmalign.core.seeds import derive_seed
from mmalign.data.batches import PairBatch, Segments
from mmalign.data.encoded.encoders import ImageEncoder, MediaEncoder, ReadMedia, VideoEncoder
from mmalign.data.encoded.first_frames import FirstFrameEncoder, FirstFrames, starts_from_image
from mmalign.data.encoded.segments import cut_segments
from mmalign.data.encoded.store import MEMORY_LIMIT, Rows, TensorStore
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
    weights = torch.tensor(table.weights(), dtype=torch.float32)[encoded["kept"]]
    return CachedPairs(
        **encoded,
        margins=None if bool(margins.isnan().all()) else margins,
        weights=None if bool(weights.isnan().all()) else weights.nan_to_num(1.0),
        segments=cut_segments(table, generator, encoded["kept"], encoded.get("rates")),
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

    def first_frame(self, index: int) -> Media | None:
        """Return the image that the videos of a record start from, None where the source has none."""
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
    """Encode the images or videos alone, as `encode_table` does, and return the fields of `CachedSides`."""
    encoder, starts = _encoders(generator, data, batch_size)
    if starts is None and generator.modality == "video" and len(table.ids) and table.first_frame(0) is not None:
        note(f"{table.name}: the model is not given the first frames in it (data.first_frame)")
    slots, firsts, kept, faults = array("q"), list[list[int]](), list[int](), list[str]()
    for index, reads in _read_ahead(table, sides, encoder):
        try:
            found = [read() for read in reads]
            where = f"{table.name}: pair '{table.ids[index]}'"
            encoder.check(where, found)
            if starts is not None:
                decision = encoder.decide(table.ids[index])
                firsts.append(starts.add(where, table.first_frame(index), decision, found))
        except UserError as error:
            if data.on_bad == "error":
                raise UserError(f"{error}; data.on_bad=skip leaves such records out") from None
            faults.append(str(error))
        else:
            kept.append(index)
            slots.extend(encoder.add_sides(found))
        if progress is not None:
            progress(1)
    _report(faults, len(table))
    if changed := encoder.report(table.name):
        note(changed)
    return {
        "kept": torch.tensor(kept, dtype=torch.long),
        "ids": [table.ids[index] for index in kept],
        "latents": encoder.finish(memory_limit),
        "latent_keys": encoder.keys,
        "slots": torch.tensor(slots, dtype=torch.long).reshape(len(kept), -1, len(encoder.flips)),
        "resolution": data.resolution or generator.image_size,
        "first_frames": None if starts is None else starts.finish(firsts, memory_limit),
        **encoder.fields(),
    }


def _encoders(generator: Any, data: DataConfig, batch_size: int) -> tuple[MediaEncoder, FirstFrameEncoder | None]:
    """Return what encodes a generator's media, and the first frames if its videos start from an image each."""
    folder = cache_folder(data)
    if generator.modality != "video":
        return ImageEncoder(folder, generator, batch_size, data), None
    starts = starts_from_image(generator, data)
    videos = VideoEncoder(folder, generator, data, first_frames=starts)
    return videos, FirstFrameEncoder(folder, generator, videos) if starts else None


def _read_ahead(
    table: Table[RecordT], sides: Callable[[RecordT], Mapping[str, Media]], encoder: MediaEncoder
) -> Iterator[tuple[int, list[Callable[[], ReadMedia]]]]:
    """Yield the number of each record with what waits for its media, which are read a few records ahead."""
    window: deque[tuple[int, list[Callable[[], ReadMedia]]]] = deque()
    for index, name in enumerate(table.ids):
        decision = encoder.decide(name)
        try:
            record = table[index]
            rates: Sequence[float] = getattr(record, "fps", (math.nan,) * 2)
            named = [(f"{table.name}: {where}", media) for where, media in sides(record).items()]
            reads = [
                encoder.begin(media, decision, where, fps) for (where, media), fps in zip(named, rates, strict=False)
            ]
        except UserError as error:
            reads = [partial(_raise, error)]
        window.append((index, reads))
        if len(window) > encoder.ahead:
            yield window.popleft()
    yield from window


def _raise(error: UserError) -> ReadMedia:
    raise error


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
    rates: Float[Tensor, " samples"] | None = None
    """Frames a second at which the videos of a sample are taken; None for images."""
    first_frames: FirstFrames | None = None
    """The images that the videos start from; None for a model that is not given them."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def facts(self, index: int) -> tuple[str | float, ...]:
        """Return the facts that identify a sample besides its id and prompt: the content of its images first."""
        given = self.first_frames
        first = () if given is None else (given.keys[int(given.slots[index, 0])],)
        return *(self.latent_keys[slot] for slot in self.slots[index, :, 0].tolist()), *first

    def sides(self, indices: Sequence[int], epoch: int, seed: int) -> tuple[list[str], list[Tensor], Tensor]:
        """Return ids, the latents of each side, and the indices as a tensor, on the CPU in float32."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        ids = [self.ids[index] for index in rows.tolist()]
        flips = self._flips(ids, epoch, seed)
        latents = [self._draw(self.slots[rows, side, flips], epoch, seed) for side in range(self.slots.shape[1])]
        if self.first_frames is not None and self.first_frames.kept:
            first = self.first_frames.take(rows, flips)["first_frame"]
            for one in latents:
                one[:, :, : first.shape[2]] = first
        return ids, latents, rows

    def _flips(self, ids: Sequence[str], epoch: int, seed: int) -> Int[Tensor, " batch"]:
        return torch.tensor([self._flipped(name, epoch, seed) for name in ids], dtype=torch.long)

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

    def _condition(
        self,
        slots: Int[Tensor, " batch"],
        rows: Int[Tensor, " batch"],
        epoch: int,
        seed: int,
    ) -> Conditioning:
        """Return the conditioning of prompts by their slots, with what else the samples of these rows are given."""
        ids = [self.ids[row] for row in rows.tolist()]
        dropped = torch.tensor([uniform(seed, "caption", name, epoch) < self.caption_dropout for name in ids])
        tensors = self.prompts[torch.where(dropped, self.empty_slot, slots)]
        if "time_ids" in tensors:
            # SDXL is conditioned on the size of the training images: one row a sample, which holds for all its sides.
            size = float(self.resolution)
            tensors["time_ids"][:] = torch.tensor([size, size, 0.0, 0.0, size, size])
        if self.first_frames is not None:
            tensors |= self.first_frames.take(rows, self._flips(ids, epoch, seed))
        return Conditioning.from_tensors(tensors)


@dataclass(kw_only=True)
class CachedPairs(CachedImages):
    """Encoded pairs; side 0 is chosen, side 1 rejected."""

    margins: Float[Tensor, " pairs"] | None
    weights: Float[Tensor, " pairs"] | None = None
    segments: Segments | None = None

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> PairBatch:
        """Return these pairs, in this order, on the CPU in float32 (embeddings in the dtype they were encoded in)."""
        ids, (chosen, rejected), rows = self.sides(indices, epoch, seed)
        return PairBatch(
            chosen=chosen,
            rejected=rejected,
            cond=self._condition(self.prompt_slots[rows], rows, epoch, seed),
            ids=ids,
            epoch=epoch,
            margins=None if self.margins is None else self.margins[rows],
            weights=None if self.weights is None else self.weights[rows],
            segments=None if self.segments is None else self.segments.select(rows),
        )

    def facts(self, index: int) -> tuple[str | float, ...]:
        """Return the content of both images, and the margin, the weight and the segments, if the data have any."""
        numbers = [float(each[index]) for each in (self.margins, self.weights) if each is not None]
        parts = () if self.segments is None else (repr([one[index].tolist() for one in self.segments.parts()]),)
        return *super().facts(index), *numbers, *parts


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
