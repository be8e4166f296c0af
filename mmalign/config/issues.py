"""What is wrong with a configuration: one issue, and the access to sections that may be missing or malformed."""

from __future__ import annotations

from typing import Any, NamedTuple

from mmalign.config.yaml import KeyPath


class ConfigIssue(NamedTuple):
    """One thing that is wrong with a configuration: its key path, and a message with what is allowed and the fix."""

    path: KeyPath
    message: str


def mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a configuration, empty where it is missing or no mapping."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}
