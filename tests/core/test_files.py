from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.files import replacing, write_atomically


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
