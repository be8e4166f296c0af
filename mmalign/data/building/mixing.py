"""Good images of two sources as one table: a model's curated images, and a share of real ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.core.io.columns import SCHEMA
from mmalign.core.io.images import read_bytes
from mmalign.core.io.parquet import atomic_parquet
from mmalign.data.labels import LabelTable


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
    count = real_count(len(own), share)
    made_from = {**(metadata or {}), "own": own.name, "real": real.name, "share": share, "seed": seed}
    with atomic_parquet(out, SCHEMA, made_from) as writer:
        numbers = [(own, f"own/{index}", index) for index in range(len(own))]
        numbers += [(real, f"real/{turn}", index) for turn, index in enumerate(_draw(len(real), count, seed))]
        for table, name, index in numbers:
            record = table[index]
            image = read_bytes(record.image, f"{table.name}: image '{record.id}'")
            writer.add({"id": name, "image": image, "caption": record.prompt, "label": "good"})
    return count


def _draw(available: int, count: int, seed: int) -> Iterator[int]:
    """Yield `count` row numbers; each pass over the rows is in rising order, which is the cheap one to read."""
    source = random.Random(seed)
    while count > 0:
        taken = sorted(source.sample(range(available), min(count, available)))
        yield from taken
        count -= len(taken)
