"""Pairs of answers for a vision-language model: decoded at the first use, then kept in memory."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
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
from mmalign.data.vlm_pairs import VlmPairTable
from pipelines.errors import PipelineError
from pipelines.vlm.batch import VlmSample

KeptT = TypeVar("KeptT")
_Pair = tuple[VlmSample, VlmSample]
"""The chosen and the rejected answer, encoded."""


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
        # Processors and networks of transformers change from release to release.
        self._made_by = (model_id, precision, repr(self.frames), version("transformers"))
        self._contents = [repr(pair) for pair in pairs]
        self._batch_size = batch_size
        self._store = cache_folder(data) / "references"
        self._memory = _Memory(memory_limit)
        self._recent = _Recent(memory_limit // 4)
        self._bad: set[int] = set()

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

        With `data.on_bad: skip` the next pair that can be used takes the place of one that cannot.

        Raises:
            UserError: media cannot be read, or the model cannot take them; the row is named.
        """
        found = [self._usable(row) for row in indices]
        rows, pairs = [row for row, _ in found], [pair for _, pair in found]
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
        """Return the media of a pair's chosen answer, decoded.

        Raises:
            UserError: they cannot be read.
        """
        record = self.table[index]
        return self._read(index, record.kind, record.media, self.media_ids[index][0], record.fps)

    def usable(self, index: int) -> bool:
        """Tell whether a pair can be used; one that cannot is counted.

        Raises:
            UserError: it cannot, and bad pairs are not left out.
        """
        return self._pair(index) is not None

    def reference_sums(
        self, log_probs: Callable[[VlmPairBatch], Float[Tensor, "batch sides"]], sides: int, beside: Sequence[str]
    ) -> Float[Tensor, "pairs sides"]:
        """Return the log-probabilities of the `sides` of every pair under the model that training starts from.

        Missing ones are computed by `log_probs` and stored by the content of model and pair, and by the pairs `beside`
        it. Those of pairs that cannot be used are NaN.
        """
        store = TensorStore(self._store / content_key(*self._made_by, sides))
        keys = [content_key(content, more) for content, more in zip(self._contents, beside, strict=True)]
        missing = [row for row, key in enumerate(keys) if key not in store]
        with track(len(missing), "reference", unit="pairs") as job:
            for start in range(0, len(missing), self._batch_size):
                rows = [row for row in missing[start : start + self._batch_size] if self.usable(row)]
                for row, sums in zip(rows, log_probs(self.batch(rows, 0, 0)) if rows else (), strict=True):
                    store.add(keys[row], {"sums": sums})
                job.advance(len(missing[start : start + self._batch_size]))
        store.flush()
        stored = [row for row, key in enumerate(keys) if key in store]
        found = torch.full((len(keys), sides), torch.nan)
        if stored:
            found[stored] = store.rows([keys[row] for row in stored])[torch.arange(len(stored))]["sums"]
        return found

    def _usable(self, index: int) -> tuple[int, _Pair]:
        """Return the first pair from this one on that can be used, and its number."""
        for row in (*range(index, len(self)), *range(index)):
            pair = self._pair(row)
            if pair is not None:
                return row, pair
        raise UserError(f"{self.table.name}: none of the {len(self)} pairs can be used")

    def _pair(self, index: int) -> _Pair | None:
        """Return a pair, encoded; None if it cannot be, and is left out."""
        if index not in self._bad:
            with self.table.bad.row():
                return self._memory.keep(index, partial(self._encode, index), _pair_bytes)
            self._bad.add(index)
        return None

    def _encode(self, index: int) -> _Pair:
        record, model = self.table[index], self.model
        shown = self.media(index)
        other = shown
        if record.rejected_media is not None:
            own = self.media_ids[index][1]
            other = self._read(index, record.kind, record.rejected_media, own, record.rejected_fps)
        try:
            asked = model.encode_prompt(record.prompt, shown.media, fps=shown.fps)
            # Both sides at one rate: perturbed videos are stored at another one, and would be known by that alone.
            again = asked if other is shown else model.encode_prompt(record.prompt, other.media, fps=shown.fps)
            pair = model.complete(asked, record.chosen), model.complete(again, record.rejected)
            for sample in pair:
                model.check_length(sample)
        except PipelineError as error:
            raise UserError(f"{self.table.where(index)}: {error}") from None
        return pair

    def _read(self, index: int, kind: str, files: Sequence[Media], media_id: str, fps: float | None) -> TimedMedia:
        where = self.table.where(index)
        return self._recent.keep(
            (kind, media_id, fps), lambda: read_media(files, kind, self.frames, fps, where), _media_bytes
        )


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


class _Recent:
    """Keeps the latest values by key up to a number of bytes, so that pairs about one video decode it once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def keep(self, key: Any, make: Callable[[], KeptT], size: Callable[[KeptT], int]) -> KeptT:
        if key in self._kept:
            self._kept.move_to_end(key)
            kept: KeptT = self._kept[key][0]
            return kept
        made = make()
        self._kept[key] = made, size(made)
        self._used += size(made)
        while self._used > self._limit:
            self._used -= self._kept.popitem(last=False)[1][1]
        return made


def _pair_bytes(pair: _Pair) -> int:
    tensors = {id(tensor): tensor.nbytes for sample in pair for tensor in sample.vision.values()}
    return sum(tensors.values())


def _media_bytes(media: TimedMedia) -> int:
    return sum(math.prod(one.shape) for one in media.media)
