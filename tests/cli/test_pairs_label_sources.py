"""`mmalign pairs label` of existing pairs, which a reward confirms or flips, and of folders of one's own pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_runs import BRIGHTNESS

from mmalign.cli import main
from mmalign.core.io.images import decode_image, encode_png
from mmalign.core.io.parquet import read_metadata


@pytest.fixture
def reward() -> str:
    return BRIGHTNESS


def png(level: int) -> bytes:
    return encode_png(torch.full((3, 4, 4), level / 255))


def label(source: Path, reward: str, out: Path, *options: str) -> list[dict]:
    assert main(["pairs", "label", str(source), "--reward", reward, "--out", str(out), *options]) == 0
    return pq.read_table(out).to_pylist()


def winners(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """Return prompt -> level of the chosen and of the rejected image."""
    found = {}
    for row in rows:
        chosen = int(row["label_1"])
        levels = [round(float(decode_image(row[f"jpg_{side}"]).mean()) * 255) for side in (chosen, 1 - chosen)]
        found[row["caption"]] = (levels[0], levels[1])
    return found


def test_a_reward_confirms_flips_and_decides_existing_pairs(tmp_path, reward, capsys):
    sides = [("a", 10, 90, 1.0), ("b", 80, 20, 1.0), ("c", 30, 60, 0.5), ("d", 50, 50, 1.0), ("e", 10, 14, 0.0)]
    rows = [
        {"caption": name, "jpg_0": png(one), "jpg_1": png(other), "label_0": first, "label_1": 1 - first,
         "ranking_id": f"id-{name}"}
        for name, one, other, first in sides
    ]  # fmt: skip
    rows.append(rows[0] | {"caption": "f", "jpg_0": b"no image", "ranking_id": "id-f"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    made = label(tmp_path / "p.parquet", reward, tmp_path / "out.parquet", "--min-margin", "0.1")
    assert winners(made) == {"a": (90, 10), "b": (80, 20), "c": (60, 30)}
    assert [row["ranking_id"] for row in made] == ["id-a", "id-b", "id-c"]
    printed = capsys.readouterr()
    # margins 80, 60 and 30 of 255: mean 0.2222
    assert (
        "3 of 6 pairs: 1 as before, 1 flipped, 1 ties decided, mean margin 0.2222; left out: 1 as ties, "
        "1 below min_margin, 1 with an image that cannot be read"
    ) in printed.out
    assert "6 pairs kept (1 of them ties) of 6 read" in printed.err and "unreadable image" in printed.err
    assert read_metadata(tmp_path / "out.parquet")["source"] == str(tmp_path / "p.parquet")


def test_pairs_with_other_columns_are_relabelled(tmp_path, reward):
    rows = [{"text": "a", "good": png(10), "bad": png(90)}, {"text": "b", "good": png(10), "bad": png(90)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    columns = ("--columns", "prompt=text,chosen=good,rejected=bad", "--limit", "1")
    assert winners(label(tmp_path / "p.parquet", reward, tmp_path / "o.parquet", *columns)) == {"a": (90, 10)}
    command = ["pairs", "label", str(tmp_path / "p.parquet"), "--reward", reward, "--out", str(tmp_path / "x.parquet")]
    assert main([*command, "--columns", "chosne=good"]) == 2
    assert main([*command, "--columns", "chosen=good"]) == 2
    assert main([*command, "--folder-prompts", "--columns", "prompt=text,chosen=good,rejected=bad"]) == 2


def pictures(folder: Path, levels: dict[str, int]) -> Path:
    for name, level in levels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(level))
    return folder


def test_folders_of_own_pictures_make_pairs(tmp_path, reward, capsys):
    folder = pictures(tmp_path / "mine", {"1/x.png": 10, "1/y.png": 50, "1/z.png": 90, "2/x.png": 70, "2/y.png": 20})
    (folder / "1" / "prompt.txt").write_text("a ring\n")
    out = tmp_path / "o.parquet"
    assert main(["pairs", "label", str(folder), "--reward", reward, "--out", str(out)]) == 2
    assert "2/x.png: has no prompt; give metadata.jsonl, NAME.txt, prompt.txt" in capsys.readouterr().err
    (folder / "2" / "x.caption").write_text("a star")
    (folder / "2" / "y.txt").write_text("a star")
    made = label(folder, reward, out)
    assert winners(made) == {"a ring": (90, 10), "a star": (70, 20)}
    assert {made[0]["image_0_uid"], made[0]["image_1_uid"]} == {"1/x.png", "1/z.png"}
    assert "2 pairs from 2 of 2 prompts" in capsys.readouterr().out
    (folder / "1" / "prompt.txt").unlink()
    assert set(winners(label(folder, reward, out, "--prompt", "any"))) == {"any", "a star"}


def test_names_of_folders_and_metadata_are_prompts(tmp_path, reward):
    folder = pictures(
        tmp_path / "mine", {"a red ring/1.png": 10, "a red ring/2.png": 50, "two/1.png": 9, "two/2.png": 3}
    )
    made = label(folder, reward, tmp_path / "o.parquet", "--folder-prompts")
    assert winners(made) == {"a red ring": (50, 10), "two": (9, 3)}
    lines = [{"file_name": name, "text": "a star"} for name in ("a red ring/1.png", "two/2.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = label(folder, reward, tmp_path / "o.parquet", "--prompt", "else")
    assert winners(made) == {"a star": (10, 3), "else": (50, 9)}


def test_two_folders_of_pairs_are_no_pictures_of_ones_own(tmp_path, reward):
    folder = pictures(tmp_path / "p", {"chosen/1.png": 10, "rejected/1.png": 90})
    assert winners(label(folder, reward, tmp_path / "o.parquet", "--prompt", "x")) == {"x": (90, 10)}
    listed = pictures(tmp_path / "q", {"1.png": 10, "2.png": 90})
    row = {"chosen_file_name": "1.png", "rejected_file_name": "2.png", "prompt": "p"}
    (listed / "metadata.jsonl").write_text(json.dumps(row))
    assert winners(label(listed, reward, tmp_path / "o.parquet")) == {"p": (90, 10)}
