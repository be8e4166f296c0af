"""Which files of folders and archives are scored, and with which prompts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.files import is_hidden
from mmalign.core.io.decode import decode
from mmalign.data.pairs import read_pairs
from mmalign.scoring.inputs import find_items


def png(red: int = 200) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def prompts(*given: Path) -> list[str | None]:
    return [item.prompt for item in find_items([str(path) for path in given], "image").items]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["22.05.png", "22.05.txt", "22.06.png", "22.06.txt"], ["22.05.txt", "22.06.txt"]),
        (["22.05.png", "22.06.png", "22.06.txt"], [None, "22.06.txt"]),
        (["7.left.png", "7.right.png", "7.txt"], ["7.txt", "7.txt"]),
        (["7.left.png", "7.left.txt", "7.right.png", "7.txt"], ["7.left.txt", "7.txt"]),
        (["7.png", "7.caption.txt"], ["7.caption.txt"]),
        (["7.png", "7.json", "7.txt"], ["7.txt"]),
        (["a/7.png", "b/7.txt"], [None]),
        (["./7.png", "./7.txt"], ["./7.txt"]),
    ],
)
def test_media_in_tars_have_their_own_prompt(tmp_path: Path, members: list[str], expected: list[str | None]) -> None:
    contents = [
        (name, png() if name.endswith("png") else json.dumps({"prompt": "json"}) if name.endswith("json") else name)
        for name in members
    ]
    assert prompts(write_tar(tmp_path / "a.tar", contents)) == expected


def test_names_and_prompts_that_repeat_in_a_tar_are_refused(tmp_path: Path) -> None:
    for name in ("1.png", "1.txt"):
        repeated = png() if name.endswith("png") else "b"
        archive = write_tar(tmp_path / "a.tar", [("1.png", png()), ("1.txt", "a"), (name, repeated)])
        with pytest.raises(UserError, match=f"a.tar: holds '{name}' more than once"):
            prompts(archive)
    two = write_tar(tmp_path / "b.tar", [("1.png", png()), ("1.a.txt", "a"), ("1.b.txt", "b")])
    with pytest.raises(UserError, match=r"'1.png' has several prompts \(1.a.txt, 1.b.txt\)"):
        prompts(two)


def test_hidden_files_are_left_out_everywhere(tmp_path: Path) -> None:
    junk = b"\0\5\26\7"
    hidden = ["._0.png", ".hidden/0.png", "__MACOSX/0.png", "__MACOSX/._0.png", "._0.txt"]
    members: list[tuple[str, bytes | str]] = [("0.png", png()), ("0.txt", "a"), *((name, junk) for name in hidden)]
    assert prompts(write_tar(tmp_path / "a.tar", members)) == ["a"]
    for name, content in members:
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert prompts(tmp_path / "folder") == ["a"]
    for side in ("chosen", "rejected"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        (tmp_path / "pairs" / side / "0.png").write_bytes(png())
        (tmp_path / "pairs" / side / "._0.png").write_bytes(junk)
    (tmp_path / "pairs/0.txt").write_text("a")
    assert len(read_pairs(str(tmp_path / "pairs"), DataConfig(pairs="x"))) == 1
    (tmp_path / "frames").mkdir()
    for name, content in (("0.png", png(7)), ("._0.png", junk)):
        (tmp_path / "frames" / name).write_bytes(content)
    assert decode(tmp_path / "frames", "video").shape == (1, 3, 4, 4)


def test_which_names_are_hidden() -> None:
    assert all(map(is_hidden, (".a", "a/.b/c", "._0.png", "__MACOSX/a", "s.csv.parts/000000.parquet")))
    assert not any(map(is_hidden, ("a.b", "./a", "../a", "a..b", "my.parts")))
