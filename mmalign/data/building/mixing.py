"""A model's own images and a share of real ones as one table: its curated images, or its pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmalign.core.io.columns import SCHEMA
from mmalign.core.io.images import read_bytes
from mmalign.core.io.parquet import atomic_parquet
from mmalign.data.labels import LabelTable
from mmalign.data.pairs import PairTable

PAIR_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "caption")),
        *((name, pa.binary()) for name in ("jpg_0", "jpg_1")),
        *((name, pa.float64()) for name in ("label_0", "label_1")),
    ]
)


def real_count(own: int, share: float) -> int:
    """Return how many real images make up `share` of a table with `own` others."""
    return round(own * share / (1 - share))


def mix_real(
    own: LabelTable,
    real: LabelTable,
    share: float,
    out: Path,
    *,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Write all images of `own` and enough of `real` to make up `share` of the table; return the number of real ones.

    The real ones are drawn without repetition until all are used, then again. Both tables hold good images
    alone (`read_labels(..., good_only=True)`); the file is one for `data.labels`, and keeps `metadata`.
    """
    count, made_from = _of(own, real, share, seed, metadata)
    with atomic_parquet(out, SCHEMA, made_from) as writer:
        numbers = [(own, f"own/{index}", index) for index in range(len(own))]
        numbers += [(real, f"real/{turn}", index) for turn, index in enumerate(_draw(len(real), count, seed))]
        for table, name, index in numbers:
            record = table[index]
            image = read_bytes(record.image, f"{table.name}: image '{record.id}'")
            writer.add({"id": name, "image": image, "caption": record.prompt, "label": "good"})
    return count


def mix_real_pairs(
    own: PairTable,
    real: LabelTable,
    share: float,
    out: Path,
    *,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Write all pairs of `own`, and real images as `share` of the table; return the number of the latter.

    A real image is a pair with itself: both sides have one error, so the pair's logit and its gradient are 0, and the
    error of its chosen side, which `sft_weight` multiplies, is all that is learned. Otherwise as `mix_real`.
    """
    count, made_from = _of(own, real, share, seed, metadata)
    with atomic_parquet(out, PAIR_SCHEMA, made_from) as writer:
        for pair in own:
            sides = [read_bytes(one, f"{own.name}: pair '{pair.id}'") for one in (pair.chosen, pair.rejected)]
            writer.add(_pair(f"own/{pair.id}", pair.prompt, *sides))
        for turn, index in enumerate(_draw(len(real), count, seed)):
            record = real[index]
            image = read_bytes(record.image, f"{real.name}: image '{record.id}'")
            writer.add(_pair(f"real/{turn}", record.prompt, image, image))
    return count


def _pair(name: str, prompt: str, chosen: bytes, rejected: bytes) -> dict[str, Any]:
    row = {"id": name, "caption": prompt, "jpg_0": chosen, "jpg_1": rejected}
    return {**row, "label_0": 1.0, "label_1": 0.0}


def _of(
    own: LabelTable | PairTable, real: LabelTable, share: float, seed: int, metadata: Mapping[str, Any] | None
) -> tuple[int, dict[str, Any]]:
    made_from = {**(metadata or {}), "own": own.name, "real": real.name, "share": share, "seed": seed}
    return real_count(len(own), share), made_from


def _draw(available: int, count: int, seed: int) -> Iterator[int]:
    """Yield `count` row numbers; each pass over the rows is in rising order, which is the cheap one to read."""
    source = random.Random(seed)
    while count > 0:
        taken = sorted(source.sample(range(available), min(count, available)))
        yield from taken
        count -= len(taken)
