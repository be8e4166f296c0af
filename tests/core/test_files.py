from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mmalign.core.errors import UserError
from mmalign.core.files import check_output, exists, is_dir, is_file, replacing, write_atomically
from mmalign.core.io.items import Item, printable, stamp_of
from mmalign.core.resources import find


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


@pytest.mark.parametrize("text", ["A" * 400, "a\0.png", "x/" * 3000, "data:image/png;base64," + "iVBORw0KGgo" * 60])
def test_text_that_can_be_no_path_does_not_exist(text: str) -> None:
    assert not exists(text) and not is_file(text) and not is_dir(Path(text))
    assert stamp_of(Path(text)) == ""
    with pytest.raises(UserError) as error:
        find(text)
    assert "no such file or directory" in str(error.value) and len(str(error.value)) < 500


def test_names_from_other_systems_are_escaped() -> None:
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert printable("half \ud83d of one") == "half \\ud83d of one"
    assert printable("caf\u00e9") == "caf\u00e9"
    assert Item(os.fsdecode(b"\xe9"), b"").name == "\\xe9"
    assert "half a character" in Item("a", b"", "\ud83d").fault and not Item("a", b"", "\u00e9").fault
