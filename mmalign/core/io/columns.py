"""Columns that tables of several kinds share, and the error for a missing one."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from mmalign.core.errors import UserError

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")


SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("caption", pa.string()), ("label", pa.string())])


def missing_columns(source: str, missing: Iterable[str], found: Iterable[str], fix: str = "") -> UserError:
    """Return the error for columns or keys that a source lacks."""
    lacking = ", ".join(f"'{name}'" for name in missing)
    present = ", ".join(f"'{name}'" for name in found) or "none"
    return UserError(f"{source}: no column {lacking}; found {present}{fix}")
