"""Pairs of answers for a vision-language model: decoded at the first use, then kept in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key
from mmalign.core.io.decode import Frames, decode, decode_video
from mmalign.core.io.images import Media
from mmalign.core.progress import track
from mmalign.data.batches import TimedMedia, VlmPairBatch
from mmalign.data.encoded.cache import cache_folder
from mmalign.data.encoded.store import MEMORY_LIMIT, TensorStore
from mmalign.data.vlm_pairs import VlmPair, VlmPairTable
from pipelines.vlm.batch import VlmSample

KeptT = TypeVar("KeptT")


class VlmPairs:
    """The pairs of a table, returned as `VlmPairBatch`; decoded media are kept as long as they fit into memory."""

    def __init__(
        self,
        table: VlmPairTable,
        model: Any,
        data: DataConfig,
        *,
        model_id: str,
        precision: str,
        batch_size: int = 8,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        """Identify the media by their content; nothing is decoded.

        `model_id` and `precision` identify the model and the computation of stored log-probabilities; `batch_size` is
        the number of pairs to compute at once. See `reference_sums`.
        """
        self.table, self.model = table, model
        self.ids = table.ids
        self.frames = Frames(data.frames, data.fps)
        margins = torch.tensor(table.margins())
        self.margins = None if bool(margins.isnan().all()) else margins
        pairs = [(pair.media_ids(), pair.facts()) for pair in table]
        self.media_ids = [media for media, _ in pairs]
        self._made_by = (model_id, precision, repr(self.frames))
        self._contents = [repr(pair) for pair in pairs]
        self._batch_size = batch_size
        self._store = cache_folder(data) / "references"
        self._memory = _Memory(memory_limit)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.ids)

    @property
    def data_id(self) -> str:
        """32 hex digits that identify the pairs in their order, by content."""
        digest = hashlib.blake2b(digest_size=16)
        for content in self._contents:
            digest.update(content.encode())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> VlmPairBatch:
        """Return these pairs, in this order; nothing about them is random.

        Raises:
            UserError: media cannot be read. PipelineError: the model cannot take them.
        """
        rows = list(indices)
        pairs = [self._memory.keep(("pair", row), partial(self._encode, row), _pair_bytes) for row in rows]
        aspects = [self.table.aspects[row] for row in rows]
        return VlmPairBatch(
            prompts=[self.table.prompts[row] for row in rows],
            chosen=[chosen for chosen, _ in pairs],
            rejected=[rejected for _, rejected in pairs],
            media=[partial(self.media, row) for row in rows],
            ids=[self.ids[row] for row in rows],
            epoch=epoch,
            margins=None if self.margins is None else self.margins[rows],
            aspects=aspects,
        )

    def media(self, index: int) -> TimedMedia:
        """Return the media of a pair's chosen answer, decoded."""
        return self._memory.keep(("media", index), partial(self._decode, index), _media_bytes)

    def reference_sums(
        self, log_probs: Callable[[VlmPairBatch], Float[Tensor, "batch sides"]], sides: int, beside: Sequence[str]
    ) -> Float[Tensor, "pairs sides"]:
        """Return the log-probabilities of the `sides` of every pair under the model that training starts from.

        Missing ones are computed by `log_probs` and stored by the content of model and pair, and by the pairs `beside`
        it.
        """
        store = TensorStore(self._store / content_key(*self._made_by, sides))
        keys = [content_key(content, more) for content, more in zip(self._contents, beside, strict=True)]
        missing = [row for row, key in enumerate(keys) if key not in store]
        with track(len(missing), "reference", unit="pairs") as job:
            for start in range(0, len(missing), self._batch_size):
                rows = missing[start : start + self._batch_size]
                for row, sums in zip(rows, log_probs(self.batch(rows, 0, 0)), strict=True):
                    store.add(keys[row], {"sums": sums})
                job.advance(len(rows))
        store.flush()
        return store.rows(keys)[torch.arange(len(keys))]["sums"]

    def _encode(self, index: int) -> tuple[VlmSample, VlmSample]:
        record, model = self.table[index], self.model
        media, fps = self._read(record, record.media)
        asked = model.encode_prompt(record.prompt, media, fps=fps)
        other = asked
        if record.rejected_media is not None:
            media, fps = self._read(record, record.rejected_media)
            other = model.encode_prompt(record.prompt, media, fps=fps)
        return model.complete(asked, record.chosen), model.complete(other, record.rejected)

    def _decode(self, index: int) -> TimedMedia:
        record = self.table[index]
        return self._read(record, record.media)

    def _read(self, record: VlmPair, files: Sequence[Media]) -> TimedMedia:
        return read_media(files, record.kind, self.frames, record.fps, f"{self.table.name}: pair '{record.id}'")


def read_media(files: Sequence[Media], kind: str, frames: Frames, fps: float | None, where: str) -> TimedMedia:
    """Decode images, or one video thinned out as `frames` says; `fps` is that of a video that does not state it.

    Raises:
        UserError: one of them cannot be read; `where` names their record at the start of the message.
    """
    media, rate = [], fps
    for file in files:
        try:
            if kind == "image":
                media.append(decode(file, kind))
            else:
                video, rate = decode_video(file, frames, fps)
                media.append(video)
        except Exception as error:  # PIL and PyAV raise anything from OSError to their own types
            name = "its bytes" if isinstance(file, bytes) else str(file)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: unreadable {kind} in {name} ({reason})") from None
    return TimedMedia(tuple(media), rate or 1.0)


class _Memory:
    """Keeps values by key up to a number of bytes; later values are made again each time."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._kept: dict[Any, Any] = {}

    def keep(self, key: Any, make: Callable[[], KeptT], size: Callable[[KeptT], int]) -> KeptT:
        if key in self._kept:
            kept: KeptT = self._kept[key]
            return kept
        made = make()
        needed = size(made)
        if needed <= self._left:
            self._left -= needed
            self._kept[key] = made
        return made


def _pair_bytes(pair: tuple[VlmSample, VlmSample]) -> int:
    tensors = {id(tensor): tensor.nbytes for sample in pair for tensor in sample.vision.values()}
    return sum(tensors.values())


def _media_bytes(media: TimedMedia) -> int:
    return sum(math.prod(one.shape) for one in media.media)
