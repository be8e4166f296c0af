"""Pairs of clips in a table, encoded: for tests of the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.config.sections import DataConfig
from mmalign.data.encoded.cache import CachedPairs, build_pair_cache
from mmalign.data.pairs import read_pairs
from pipelines import Generator


def write_table(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write a row for each pair of files, with a prompt and its number, and return the table."""
    source = folder / "pairs.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "a cat", "id": str(n), **row}) for n, row in enumerate(rows)))
    return str(source)


def encode(model: Generator, source: str, **options: Any) -> CachedPairs:
    """Encode the pairs of a table; the cache lies beside it."""
    data = DataConfig(pairs=source, cache=str(Path(source).parent / "cache"), **options)
    return build_pair_cache(read_pairs(source, data), model, data)
