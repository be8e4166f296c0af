"""Which files of folders and archives are scored, and with which prompts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image, features

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


def test_captions_beside_files_and_in_tars_have_either_suffix(tmp_path: Path) -> None:
    for name in ("1.png", "22.05.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "1.caption").write_text("\ufeffone\n", encoding="utf-8")
    (tmp_path / "22.05.caption").write_text("two")
    assert prompts(tmp_path) == ["one", "two"]
    (tmp_path / "1.txt").write_text("one")
    assert prompts(tmp_path) == ["one", "two"]
    (tmp_path / "1.txt").write_text("three")
    with pytest.raises(UserError, match=r"1.png: 1.txt and 1.caption hold different prompts"):
        prompts(tmp_path)
    members = [("7.png", png()), ("7.caption", "seven"), ("7.txt", "seven")]
    assert prompts(write_tar(tmp_path / "a.tar", members)) == ["seven"]


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


def save(path: Path, red: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(red))


def lines(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_prompts_come_from_the_nearest_metadata_by_relative_path(tmp_path: Path) -> None:
    for name in ("0.png", "train/0.png", "train/deep/0.png"):
        save(tmp_path / name)
    names = ("0.png", "./train/0.png", "train/deep/0.png")
    lines(tmp_path / "metadata.jsonl", *({"file_name": name, "text": f"root {name}"} for name in names))
    (tmp_path / "train/deep/metadata.csv").write_text("file_name,text\n0.png,deep\n")
    assert prompts(tmp_path) == ["root 0.png", "root ./train/0.png", "deep"]
    lines(tmp_path / "metadata.jsonl", {"file_name": "0.png", "text": "a"}, {"file_name": "0.png", "text": "b"})
    with pytest.raises(UserError, match="record 1: '0.png' has another prompt before"):
        prompts(tmp_path)


def test_metadata_need_no_prompts_and_a_sidecar_may_hold_them(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n")
    (tmp_path / "1.txt").write_text("a dog")
    assert prompts(tmp_path) == [None, "a dog"]


def test_the_grid_of_generated_images_is_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0-0.png", "grid.png"):
        save(tmp_path / "own" / name)
        save(tmp_path / "other" / name)
    lines(tmp_path / "own/metadata.jsonl", {"file": "0-0.png", "prompt": "a"})
    assert prompts(tmp_path / "own") == prompts(tmp_path / "own/*.png") == ["a"]
    assert "1 images read, 1 left out: 1 grid.png of mmalign generate" in capsys.readouterr().err
    assert prompts(tmp_path / "other") == [None, None]


def test_what_pillow_reads_is_read_and_the_rest_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.png", "b.jfif", "c.JPE", "d.tif", "e.gif", "f.ppm", "g.tga"]
    names += ["h.jp2"] if features.check("jpg_2000") else []
    names += ["i.avif"] if features.check("avif") else []
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        for name in names:
            kind = {".jfif": "JPEG", ".JPE": "JPEG"}.get(Path(name).suffix)
            Image.new("RGB", (4, 4)).save(tmp_path / side / name, kind)
            (tmp_path / f"{Path(name).stem}.txt").write_text("a")
    for name in ("x.heif-sequence", "y.psd", "z.psd"):
        (tmp_path / "chosen" / name).write_bytes(b"x")
    (tmp_path / "chosen/gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "chosen/linked").symlink_to(tmp_path / "rejected")
    left_out = "5 left out: 1 .heif-sequence, 2 .psd, 1 broken links, 1 linked folders"
    assert len(prompts(tmp_path / "chosen")) == len(names)
    assert f"{len(names)} images read, {left_out}" in capsys.readouterr().err
    assert len(read_pairs(str(tmp_path), DataConfig(pairs="x"))) == len(names)
    assert f"{2 * len(names)} images read, {left_out}" in capsys.readouterr().err
    for item in find_items([str(tmp_path / "rejected")], "image").items:
        assert decode(Path(item.name), "image").shape == (3, 4, 4)
