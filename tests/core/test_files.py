from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmalign.core.errors import UserError
from mmalign.core.files import check_output, replacing, write_atomically


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(path, "größer")
    assert path.read_bytes() == "größer".encode()
    with replacing(path) as aside:
        aside.write_bytes(b"new")
        assert path.read_text(encoding="utf-8") == "größer"
    assert path.read_bytes() == b"new"


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path / "file", folder=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for path, folder, message in (
        ("file", True, "is a file; name another folder"),
        ("file/run", True, f"{tmp_path / 'file'} on the way there is a file; name another folder"),
        ("file/run/pairs.parquet", False, "on the way there is a file"),
        ("", False, "is a folder; name a file"),
    ):
        with pytest.raises(UserError, match=f"^output {re.escape(str(tmp_path / path))}: .*{re.escape(message)}"):
            check_output(tmp_path / path, "output", folder=folder)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"new: {re.escape(str(tmp_path))} is not writable"):
        check_output(tmp_path / "new")
