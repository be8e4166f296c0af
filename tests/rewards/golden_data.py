"""Where the golden data lie: `MMALIGN_GOLDEN`, by default `../shared/golden` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "golden"


def golden_file(name: str) -> Path:
    """Return a file of the golden data (`../prompts/...` for prompt sets), or skip the test where it is absent."""
    path = Path(os.environ.get("MMALIGN_GOLDEN") or _BESIDE) / name
    if not path.exists():
        pytest.skip(f"golden data: no {name}; MMALIGN_GOLDEN names their folder")
    return path
