"""Give images captions that do not fit them: by a language that guarantees them false, or by a source of contrasts.

A third party's language joins by an entry point in the group `mmalign.false_captions`. It names a function from a
caption to captions that are false wherever it is true, by the kind of edit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmalign.core.errors import UserError
from mmalign.core.io.images import read_bytes
from mmalign.core.io.parquet import atomic_parquet
from mmalign.core.registry import false_captions
from mmalign.core.seeds import derive_seed
from mmalign.data.labels import LabelRecord, LabelTable
from rewards.language.contrast import make_contrast
from rewards.language.contrast_rules import FALSE_KINDS

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("caption_rejected", pa.string()),
        ("label", pa.string()),
        ("edit", pa.string()),
    ]
)
PART = 256

Edits = Callable[[str], Mapping[str, Sequence[str]]]
"""From a caption to captions that do not fit, by the kind of edit."""


@dataclass
class PerturbCounts:
    """Counts of the images kept and left out."""

    kept: int = 0
    bad: int = 0
    without: int = 0
    edits: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return the counts as one line."""
        edits = ", ".join(f"{count} {kind}" for kind, count in sorted(self.edits.items()))
        return (
            f"{self.kept} images with a rejected caption ({edits}); left out: {self.bad} bad images, "
            f"{self.without} whose caption no edit makes false"
        )


def edits_of(source: Any) -> tuple[Edits, int]:
    """Return a source of rejected captions, and the number of captions to give it at a time.

    `source` names a language of `mmalign.core.registry.false_captions`, such as "shapes", which checks that an edited
    caption cannot be true as well; or an argument of `rewards.language.contrast.make_contrast`: "rules" of English, a
    file, or an endpoint. Of the rules, `drop` is left out: a caption without one of its things is still true.
    """
    if isinstance(source, str) and source in false_captions:
        return partial(_edits_in, false_captions.get(source)), 1
    contrast = make_contrast({"rules": {"kinds": list(FALSE_KINDS)}} if source == "rules" else source)
    return lambda caption: {"contrast": contrast(caption)}, getattr(contrast, "concurrency", 1)


def _edits_in(language: Edits, caption: str) -> Mapping[str, Sequence[str]]:
    try:
        return language(caption)
    except UserError as error:
        raise UserError(f"{error}; for other captions give --contrast rules, or --endpoint and --llm") from None


def perturb_captions(
    table: LabelTable,
    out: Path,
    source: Any = "shapes",
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PerturbCounts:
    """Write the good images with their caption and a rejected one to `out`, in the columns of `data.labels`.

    The kind of edit is drawn first, then the caption, so that the few relations are as frequent as the many colours;
    both depend on (seed, id) alone. `source` is that of `edits_of`. `progress` is called with the images read.

    Raises:
        UserError: no image is left. RewardError: the endpoint fails.
    """
    edits, at_a_time = edits_of(source)
    counts = PerturbCounts()
    metadata = {"perturbed": table.name, "seed": seed, "contrast": source if isinstance(source, str) else "endpoint"}
    with atomic_parquet(out, SCHEMA, metadata) as writer, ThreadPoolExecutor(at_a_time) as pool:
        for part in _parts(table, PART):
            good = [record for record in part if record.good]
            distinct = list(dict.fromkeys(record.prompt for record in good))
            found = dict(zip(distinct, pool.map(edits, distinct), strict=True))
            counts.bad += len(part) - len(good)
            for record in good:
                by_kind = {kind: captions for kind, captions in found[record.prompt].items() if captions}
                if not by_kind:
                    counts.without += 1
                    continue
                draw = random.Random(derive_seed(seed, "perturb", record.id))
                kind = draw.choice(list(by_kind))
                writer.add(_row(record, draw.choice(by_kind[kind]), kind, table.name))
                counts.kept += 1
                counts.edits[kind] += 1
            if progress is not None:
                progress(len(part))
        if not counts.kept:
            raise UserError(f"{table.name}: no image is left to write ({counts})")
    return counts


def _parts(records: Iterable[LabelRecord], size: int) -> Iterator[list[LabelRecord]]:
    remaining = iter(records)
    while part := list(islice(remaining, size)):
        yield part


def _row(record: LabelRecord, rejected: str, kind: str, source: str) -> dict[str, Any]:
    return {
        "id": record.id,
        "image": read_bytes(record.image, f"{source}: image '{record.id}'"),
        "caption": record.prompt,
        "caption_rejected": rejected,
        "label": "good",
        "edit": kind,
    }
