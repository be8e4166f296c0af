"""Score a stream of items by several rewards in one pass: threads decode each medium once for all rewards."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.files import exists
from mmalign.core.io.decode import ALL_FRAMES, Frames, decode
from mmalign.core.io.items import Item
from mmalign.scoring.choice import WeightedReward
from rewards import RewardError

BATCH_PIXELS = 1 << 26
"""A batch is closed at this number of pixels (0.8 GB as floats), however few media it holds."""


@dataclass(frozen=True)
class Scored:
    """The result for an item: a score for each reward (NaN where a reward gave none), or the error."""

    item: Item
    scores: dict[str, float]
    error: str = ""


def score_items(
    items: Iterable[Item],
    rewards: Sequence[WeightedReward],
    *,
    modality: str = "image",
    batch_size: int = 32,
    workers: int | None = None,
    frames: Frames = ALL_FRAMES,
) -> Generator[Scored, None, None]:
    """Yield every item with its scores, in order.

    Items are decoded by `workers` threads, two batches ahead of the rewards, where `decode_beside` uses threads. A
    batch is `batch_size` media, or fewer where they are large. An item that cannot be decoded, lacks a prompt
    that a reward needs, or is refused by a reward comes with its error; the others of its batch come with their
    scores.
    """
    needs_prompt = next((entry.name for entry in rewards if "prompts" in entry.reward.needs), None)
    batch: list[tuple[Item, Tensor | str]] = []
    pixels = 0
    for item, decoded in decode_beside(rewards, items, modality, 2 * batch_size, _reader(modality, frames), workers):
        if needs_prompt is not None and item.prompt is None and isinstance(decoded, Tensor):
            decoded = f"has no prompt, and reward '{needs_prompt}' needs one"
        batch.append((item, decoded))
        pixels += decoded.numel() // 3 if isinstance(decoded, Tensor) else 0
        if len(batch) >= batch_size or pixels >= BATCH_PIXELS:
            yield from _score_batch(batch, rewards)
            batch, pixels = [], 0
    if batch:
        yield from _score_batch(batch, rewards)


def decode_beside(
    rewards: Sequence[WeightedReward],
    items: Iterable[Item],
    modality: str,
    ahead: int,
    reader: Callable[[Any], Any],
    workers: int | None = None,
) -> Iterator[tuple[Item, Any]]:
    """Yield items, in order, with what `reader` makes of their bytes or path, or the error as text.

    They are decoded by `workers` threads, `ahead` of them in advance; or one after the other by this thread, where the
    rewards compute on a CPU with as many threads as it has cores, which keep all cores busy even while they wait.
    """
    on_cpu = all(entry.reward.device.type == "cpu" for entry in rewards)
    if on_cpu and torch.get_num_threads() >= (os.cpu_count() or 1):
        return ((item, _decode(*_read(item), modality, reader)) for item in items)
    return decode_ahead(items, modality, ahead, workers, reader=reader)


def decode_ahead(
    items: Iterable[Item],
    modality: str,
    ahead: int,
    workers: int | None = None,
    frames: Frames = ALL_FRAMES,
    reader: Callable[[Any], Any] | None = None,
) -> Iterator[tuple[Item, Any]]:
    """Yield items, in order, with their 8-bit tensor, or the error as text; `ahead` of them are decoded in advance.

    `reader` replaces the decoder of 8-bit tensors: it is called with the bytes or the path, in a thread.
    """
    reader = reader or _reader(modality, frames)
    coming = iter(items)
    workers = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        pending: deque[tuple[Item, Future[Any]]] = deque()

        def start(count: int) -> None:
            for item in islice(coming, count):
                pending.append((item, pool.submit(_decode, *_read(item), modality, reader)))

        start(ahead)
        try:
            while pending:
                item, future = pending.popleft()
                yield item, future.result()
                start(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(item: Item) -> tuple[Any, str]:
    """Fetch sources that must be read in order; (None, the reason) on failure."""
    if item.fault:
        return None, item.fault
    try:
        return (item.media() if callable(item.media) else item.media), ""
    except Exception as error:  # a damaged archive or column raises anything
        return None, _reason(error)


def _reader(modality: str, frames: Frames) -> Callable[[Any], Any]:
    return lambda media: decode(media, modality, frames)


def _decode(media: Any, failed: str, modality: str, reader: Callable[[Any], Any]) -> Any:
    if failed:
        return failed
    if isinstance(media, Path) and not exists(media):
        return "no such file"
    try:
        return reader(media)
    except Exception as error:  # decoders of untrusted bytes raise anything
        return f"unreadable {modality} ({_reason(error)})"


def _reason(error: Exception) -> str:
    # PIL prints the address of the buffer, which carries no information and changes from run to run.
    return " ".join(str(error).split("<_io")[0].split())[:200] or type(error).__name__


def _score_batch(batch: Sequence[tuple[Item, Tensor | str]], rewards: Sequence[WeightedReward]) -> Iterator[Scored]:
    done: dict[int, Scored] = {}
    groups: dict[torch.Size, list[int]] = {}
    for index, (item, decoded) in enumerate(batch):
        if isinstance(decoded, Tensor):
            groups.setdefault(decoded.shape, []).append(index)
        else:
            done[index] = Scored(item, {}, decoded)
    for members in groups.values():
        levels = torch.stack([batch[index][1] for index in members])  # type: ignore[misc]
        scored = score_group([batch[index][0] for index in members], levels, rewards)
        done |= dict(zip(members, scored, strict=True))
    yield from (done[index] for index in range(len(batch)))


def score_group(items: list[Item], levels: Tensor, rewards: Sequence[WeightedReward]) -> list[Scored]:
    """Score media of one size; if a reward refuses them, one by one, so that only the faulty ones have no score."""
    try:
        return _score_media(items, levels, rewards)
    except (RewardError, UserError) as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        reason = f"too large for the memory ({' x '.join(map(str, levels.shape[:0:-1][:2]))} pixels)"
    if len(items) == 1:
        return [Scored(items[0], {}, reason)]
    return [score_group([item], levels[index : index + 1], rewards)[0] for index, item in enumerate(items)]


def _is_memory(error: Exception) -> bool:
    """Tell whether memory ran out: on a device, in Python, or in PyTorch's allocator for the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _score_media(items: list[Item], levels: Tensor, rewards: Sequence[WeightedReward]) -> list[Scored]:
    columns = {}
    media: dict[torch.device, Tensor] = {}
    for entry in rewards:
        device = entry.reward.device
        if device not in media:  # copied as bytes, converted to floats on the device
            media[device] = levels.to(device).float().div_(255)
        prompts = [item.prompt for item in items] if "prompts" in entry.reward.needs else None
        columns[entry.name] = entry.reward(media[device], prompts=prompts).double().tolist()
    return [
        Scored(item, {name: values[index] for name, values in columns.items()}) for index, item in enumerate(items)
    ]
