"""A full disk under `data.cache` is the system's error for it, and names the key."""

from __future__ import annotations

import errno
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mmalign.cli import main
from mmalign.data.encoded import store as module
from mmalign.data.encoded.store import TensorStore

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_one_line_that_names_the_key(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    rows = TensorStore(tmp_path / "rows")
    rows.add("a", {"x": torch.ones(2)})

    def flush(*_: Any) -> int:
        rows.flush()
        return 0

    monkeypatch.setattr(importlib.import_module("mmalign.cli.main"), "_dispatch", flush)
    assert main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the disk is full while writing") and f"{tmp_path / 'rows'} (data.cache)" in line
    monkeypatch.undo()
    rows.flush()  # nothing was lost: with room, the same rows are written
    assert torch.equal(TensorStore(tmp_path / "rows").rows(["a"])[torch.tensor([0])]["x"], torch.ones(1, 2))


def test_another_error_of_the_writer_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: os error 280")

    monkeypatch.setattr(module, "save_file", fail)
    rows = TensorStore(tmp_path)
    rows.add("a", {"x": torch.ones(2)})
    with pytest.raises(SafetensorError):
        rows.flush()
