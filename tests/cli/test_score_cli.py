"""`mmalign score`: every kind of input gives the same scores, runs resume, and what is bad is said and counted."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.core.io.decode import Frames, decode
from mmalign.core.io.parquet import read_metadata
from mmalign.scoring import engine, results
from mmalign.scoring.chosen import fingerprint_reward, read_choices
from rewards import Reward, register


@register
class Redness(Reward):
    """Mean of the red channel."""

    name = "test-redness"
    version = "r1"
    range = (0.0, 1.0)

    def score(self, media, prompts, references):
        return media[:, 0].mean((1, 2))


@register
class Wordiness(Reward):
    """Letters of the prompt, and the blue channel behind the point."""

    name = "test-wordiness"
    needs = frozenset({"prompts"})
    higher_is_better = False

    def score(self, media, prompts, references):
        return torch.tensor([float(len(prompt)) for prompt in prompts]) + media[:, 2].mean((1, 2)) / 10


@register
class Moody(Reward):
    """Refuses white pictures, and knows no score for black ones."""

    name = "test-moody"

    def score(self, media, prompts, references):
        from rewards import RewardError

        if bool((media.amin((1, 2, 3)) == 1).any()):
            raise RewardError("a white picture")
        means = media.mean((1, 2, 3))
        return torch.where(means == 0, math.nan, means)


@register
class Steps(Reward):
    """Number of frames and the mean of the last one."""

    name = "test-steps"
    modality = "video"

    def score(self, media, prompts, references):
        return media.shape[1] + media[:, -1].mean((1, 2, 3)) / 10


LEVELS = [0, 51, 102, 153, 204]
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
RED = [level / 255 for level in LEVELS]
WORDS = [len(prompt) + 0.1 * 10 / 255 for prompt in PROMPTS]


def picture(level: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, 200, 10))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    picture(level).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five pictures whose scores are known; the first three prompts in metadata.jsonl, the others in sidecars."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for number, level in enumerate(LEVELS):
        picture(level).save(images / f"{number}.png")
    lines = [json.dumps({"file": f"{number}.png", "prompt": PROMPTS[number]}) for number in range(3)]
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for number in (3, 4):
        (images / f"{number}.txt").write_text(PROMPTS[number] + "\n")
    return images


def score(*arguments: str, out: str = "s.parquet", rewards: str = "test-redness,test-wordiness") -> int:
    return main(["score", *arguments, "--rewards", rewards, "--out", out])


def rows(out: str = "s.parquet") -> list[dict]:
    return pq.read_table(out).to_pylist()


def column(name: str, out: str = "s.parquet") -> list:
    return [row[name] for row in rows(out)]


def test_a_folder_in_one_pass(folder, capsys, monkeypatch):
    decoded = []
    monkeypatch.setattr(engine, "decode", lambda media, *rest: decoded.append(media) or decode(media, *rest))
    assert score("images") == 0
    assert len(decoded) == 5
    assert column("id") == column("path") == [f"images/{number}.png" for number in range(5)]
    assert column("prompt") == PROMPTS
    assert column("test-redness") == pytest.approx(RED) and column("test-wordiness") == pytest.approx(WORDS)
    assert column("error") == [None] * 5
    metadata = read_metadata("s.parquet")
    assert [(one["name"], one["version"], one["weight"]) for one in metadata["rewards"]] == [
        ("test-redness", "r1", None),
        ("test-wordiness", "1", None),
    ]
    assert metadata["rewards"][0]["range"] == [0.0, 1.0] and metadata["rewards"][1]["range"] == [None, None]
    captured = capsys.readouterr()
    assert "5 images (5 new): s.parquet" in captured.out
    assert "0.4" in captured.out and "r1" in captured.out  # mean of the levels; the version in the table
    assert "images/s" in captured.err
    assert not Path("s.parquet.parts").exists()


def write_tar(path: str, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for number, level in enumerate(LEVELS):
            add(f"part.0/{number}.img.png", png(level))
            if number % 2:
                add(f"part.0/{number}.txt", PROMPTS[number].encode())
            else:
                add(f"part.0/{number}.json", json.dumps({"caption": PROMPTS[number], "sha": "x"}).encode())


def write_table(name: str) -> None:
    paths = [f"images/{number}.png" for number in range(5)]
    table = [{"Prompt": prompt, "image": path} for prompt, path in zip(PROMPTS, paths, strict=True)]
    if name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n\n" for row in table))
    elif name.endswith(".csv"):
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["Prompt", "image"])
            writer.writeheader()
            writer.writerows(table)
    elif name == "paths.parquet":
        pq.write_table(pa.Table.from_pylist(table), name)
    else:
        inside = {"bytes.parquet": png, "struct.parquet": lambda level: {"bytes": png(level), "path": None}}[name]
        cells = [{"prompt": prompt, "image": inside(level)} for prompt, level in zip(PROMPTS, LEVELS, strict=True)]
        pq.write_table(pa.Table.from_pylist(cells), name, row_group_size=2)


@pytest.mark.parametrize(
    "given", ["t.jsonl", "t.csv", "paths.parquet", "bytes.parquet", "struct.parquet", "t.tar", "t.tar.gz", "glob"]
)
def test_every_kind_of_input_gives_the_same_scores(folder, given):
    if ".tar" in given:
        write_tar(given, "w:gz" if given.endswith("gz") else "w")
    elif given != "glob":
        write_table(given)
    assert score("images/*.png" if given == "glob" else given) == 0
    assert column("prompt") == PROMPTS
    assert column("test-redness") == pytest.approx(RED) and column("test-wordiness") == pytest.approx(WORDS)
    names = {"glob": "images/1.png", "t.tar": "t.tar/part.0/1.img.png", "t.tar.gz": "t.tar.gz/part.0/1.img.png"}
    assert column("id")[1] == names.get(given, f"{given}#1")
    assert score("images/*.png" if given == "glob" else given) == 0  # from what is there


def test_what_is_there_is_not_scored_again(folder, capsys, monkeypatch):
    assert score("images") == 0
    first = rows()
    seen = []
    monkeypatch.setattr(engine, "decode", lambda media, *rest: seen.append(Path(media).name) or decode(media, *rest))
    assert score("images") == 0
    assert seen == [] and rows() == first
    picture(255).save(folder / "1.png")
    (folder / "4.txt").write_text("fff")
    picture(20).save(folder / "5.png")
    (folder / "5.txt").write_text("gg")
    capsys.readouterr()
    assert score("images") == 0
    assert sorted(seen) == ["1.png", "4.png", "5.png"]
    assert column("test-redness") == pytest.approx([RED[0], 1.0, *RED[2:], 20 / 255])
    assert "6 images (3 new)" in capsys.readouterr().out
    (folder / "5.png").unlink()
    assert score("images") == 2
    assert "1 items scored there are not among the inputs (such as images/5.png)" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_text_formats_hold_the_same_and_are_read_back(folder, suffix, capsys):
    out = f"s.{suffix}"
    assert score("images") == 0 and score("images", out=out) == 0
    with open(out, newline="") as file:
        found = list(csv.DictReader(file)) if suffix == "csv" else [json.loads(line) for line in file]
    assert [float(row["test-redness"]) for row in found] == column("test-redness")  # to the last bit
    assert [row["prompt"] for row in found] == PROMPTS
    assert json.loads(Path(f"{out}.meta.json").read_text()) == read_metadata("s.parquet")
    capsys.readouterr()
    assert score("images", out=out) == 0
    assert "(0 new)" in capsys.readouterr().out
    assert score("images", out=out, rewards="test-redness") == 2
    assert f"{out} holds scores made with other settings (rewards test-redness,test-wordiness -> test-redness" in (
        capsys.readouterr().err
    )
    Path(f"{out}.meta.json").unlink()
    assert score("images", out=out) == 2
    assert "was not written by `mmalign score`" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(folder, monkeypatch, capsys):
    monkeypatch.setattr(results, "PART_ROWS", 2)
    assert score("images", out="whole.parquet") == 0
    real, calls = Redness.score, []

    def killed(self, media, prompts, references):
        calls.append(len(media))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, media, prompts, references)

    monkeypatch.setattr(Redness, "score", killed)
    assert score("images", "--batch-size", "1") == 130
    assert not Path("s.parquet").exists()
    parts = sorted(Path("s.parquet.parts").glob("*"))
    assert [len(pq.read_table(part)) for part in parts] == [2, 1]
    monkeypatch.setattr(Redness, "score", real)
    capsys.readouterr()
    assert score("images", rewards="test-redness:2,test-wordiness") == 0  # other settings are not blocked
    assert "2 parts of an unfinished run are left out" in (said := capsys.readouterr().err)
    assert "test-redness.weight none -> 2.0" in said
    assert sorted(Path("s.parquet.parts").glob("*")) == parts  # and nothing is lost
    Path("s.parquet").unlink()
    assert score("images") == 0
    captured = capsys.readouterr()
    assert "5 images (2 new)" in captured.out and "3 of 5 images are scored already" in captured.err
    assert rows() == rows("whole.parquet")
    assert not Path("s.parquet.parts").exists()


def test_a_reward_of_other_weights_or_version_is_another_reward(folder, monkeypatch, capsys):
    assert score("images", rewards="test-redness") == 0
    monkeypatch.setattr(Redness, "version", "r2")
    assert score("images", rewards="test-redness") == 2
    assert "(test-redness.version r1 -> r2)" in capsys.readouterr().err

    class Learned(Redness):
        name = "test-learned"

        def __init__(self, shift: float, **options):
            super().__init__(**options)
            self.weight = torch.nn.Parameter(torch.full((9000,), shift))

    one, other = fingerprint_reward(Learned(0.0)), fingerprint_reward(Learned(1e-3))
    assert one == fingerprint_reward(Learned(0.0))
    assert one[0] != other[0] and one[1] == other[1]


def test_bad_items_stop_the_run_or_are_skipped_and_counted(folder, capsys):
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    (folder / "2.png").write_text("no picture")
    assert score("images") == 2
    error = capsys.readouterr().err
    assert "images/1.png: unreadable image" in error and "--skip-bad" in error and error.count("error:") == 1
    assert len(pq.read_table("s.parquet.parts/000000.parquet")) == 1  # what came before is kept
    assert score("images", "--skip-bad") == 3
    captured = capsys.readouterr()
    assert "bad: images/1.png: unreadable image" in captured.err and "bad: images/2.png" in captured.err
    assert "5 images (4 new, 2 bad)" in captured.out
    assert [value is None for value in column("test-redness")] == [False, True, True, False, False]
    assert "unreadable image" in column("error")[2] and column("error")[3] is None
    picture(LEVELS[1]).save(folder / "1.png")
    picture(LEVELS[2]).save(folder / "2.png")
    assert score("images") == 0  # mended ones are scored, the others are not touched
    assert "(2 new)" in capsys.readouterr().out
    assert column("test-redness") == pytest.approx(RED)


def test_what_a_reward_refuses_is_bad_alone_and_what_it_cannot_rate_is_counted(folder, capsys):
    Image.new("RGB", (6, 4), "white").save(folder / "2.png")
    Image.new("RGB", (6, 4), "black").save(folder / "3.png")
    assert score("images", rewards="test-moody") == 2
    assert "images/2.png: a white picture" in capsys.readouterr().err
    assert score("images", "--skip-bad", rewards="test-moody") == 3
    assert [value is None for value in column("test-moody")] == [False, False, True, True, False]
    assert column("error") == [None, None, "a white picture", None, None]


def test_rows_that_name_nothing_readable(folder, capsys):
    Path("t.jsonl").write_text('{"image": "images/0.png", "prompt": "x"}\n{"image": "no.png", "prompt": "x"}\n')
    assert score("t.jsonl") == 2
    assert "t.jsonl#1: no such file" in capsys.readouterr().err
    pq.write_table(pa.table({"image": [png(0), None], "prompt": ["x", "y"]}), "t.parquet")
    assert score("t.parquet", "--skip-bad", rewards="test-redness", out="s.csv") == 3
    assert "column 'image' holds a NoneType" in Path("s.csv").read_text()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_faulty_row_is_bad_alone(folder, kind, capsys):
    images = ["images/0.png", None, "", "images/1.png"]
    if kind == "jsonl":
        rows = [{"image": image, "prompt": "x"} for image in images]
        rows += [{"prompt": "x"}, {"image": "images/2.png", "prompt": 7}]
        Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({"image": images, "prompt": ["x"] * 4}), "t.parquet")
    assert score(f"t.{kind}") == 2
    assert f"t.{kind}#1: expected the path of a file, found None" in capsys.readouterr().err
    assert score(f"t.{kind}", "--skip-bad") == 3
    expected = [RED[0], None, None, RED[1]] + [None, None] * (kind == "jsonl")
    assert column("test-redness") == pytest.approx(expected)
    if kind == "jsonl":
        assert column("error")[4:] == [
            "expected the path of a file, found None", "the prompt is a int; expected text"
        ]  # fmt: skip


def test_what_can_be_no_path_is_bad_alone(folder):
    images = ["images/0.png", "A" * 400, "a\0.png", "images/3.png"]
    Path("t.jsonl").write_text("".join(json.dumps({"image": image}) + "\n" for image in images))
    assert score("t.jsonl", "--skip-bad", rewards="test-redness") == 3
    assert column("test-redness") == pytest.approx([0.0, None, None, 0.6])
    assert column("error") == [None, "no such file", "no such file", None]


def test_a_name_that_is_not_utf8_is_escaped(folder, capsys):
    Path(os.fsdecode(b"images/caf\xe9.png")).write_bytes(png(51))
    for out in ("s.csv", "s.jsonl", "s.parquet"):
        assert score("images", out=out, rewards="test-redness") == 0
        assert score("images", out=out, rewards="test-redness") == 0
        assert "(0 new)" in capsys.readouterr().out
    assert column("id")[5] == "images/caf\\xe9.png" and column("test-redness")[5] == pytest.approx(0.2)


def test_what_does_not_fit_in_memory_is_bad_alone(folder, monkeypatch):
    def redness(self, media, prompts, references):
        if media.shape[-1] == 7 or len(media) > 1 and media.shape[-1] == 5:
            raise torch.OutOfMemoryError("out of memory")
        return media[:, 0].mean((1, 2))

    monkeypatch.setattr(Redness, "score", redness)
    picture(0, (7, 3)).save("images/1.png")
    for name in "34":
        picture(51, (5, 3)).save(f"images/{name}.png")
    assert score("images", "--skip-bad", rewards="test-redness") == 3
    assert column("test-redness") == pytest.approx([0.0, None, 0.4, 0.2, 0.2])
    assert column("error")[1] == "too large for the memory (7 x 3 pixels)"


def test_paths_in_parquet_in_every_encoding_of_text(folder):
    paths = pa.array(["images/0.png", "images/3.png", "images/0.png"])
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"image": paths.cast(kind)}), "t.parquet")
        assert score("t.parquet", rewards="test-redness") == 0
        assert column("test-redness") == pytest.approx([0.0, 0.6, 0.0])
        Path("s.parquet").unlink()


def test_prompts(folder, capsys):
    (folder / "4.txt").unlink()
    assert score("images") == 2
    error = capsys.readouterr().err
    assert "1 of 5 inputs have no prompt, and reward 'test-wordiness' needs one (first: images/4.png)" in error
    assert score("images", "--skip-bad", rewards="test-wordiness", out="a.parquet") == 3
    assert column("error", "a.parquet")[4] == "has no prompt, and reward 'test-wordiness' needs one"
    assert score("images", "--prompt", "four", rewards="test-wordiness", out="b.parquet") == 0
    assert column("prompt", "b.parquet") == ["four"] * 5


def test_the_same_pictures_given_twice_are_scored_once(folder, capsys):
    assert score("images", "images/1.png", "images/*.png") == 0
    assert len(rows()) == 5
    assert "6 images are given more than once" in capsys.readouterr().err


def test_weights_add_a_total(folder):
    assert score("images", rewards="test-redness:10,test-wordiness:0.5") == 0
    expected = [10 * red - 0.5 * words for red, words in zip(RED, WORDS, strict=True)]  # fewer words are better
    assert column("total") == pytest.approx(expected)


def test_rewards_from_a_file_and_options(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "rewards:\n  - test-redness\n  - {name: clip, label: clip-hessel, weight: 2, options: {kind: hessel}}\n"
    )
    first, second = read_choices(str(path), ["clip-hessel.scale=3", "clip-hessel.weights=some/dir"])
    assert (first.name, first.label, first.weight, dict(first.options)) == ("test-redness", "test-redness", None, {})
    assert (second.label, second.weight) == ("clip-hessel", 2.0)
    assert second.options == {"kind": "hessel", "scale": 3, "weights": "some/dir"}
    with pytest.raises(
        UserError, match="'clip.kind=hessel': write REWARD.OPTION=VALUE for one of test-redness, clip-h"
    ):
        read_choices(str(path), ["clip.kind=hessel"])
    path.write_text("rewards: [clip, clip]\n")
    with pytest.raises(UserError, match="'clip' occurs more than once; give each its own label"):
        read_choices(str(path))
    path.write_text("rewards: [{name: clip, wieght: 2}]\n")
    with pytest.raises(UserError, match="did you mean 'weight'"):
        read_choices(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "--out", "s.json"], "use one of .parquet, .csv, .jsonl"),
        (["nothing", "--out", "s.csv"], "nothing: no such file or directory"),
        (["images/*.webp", "--out", "s.csv"], "images/*.webp: matches no file"),
        (["empty", "--out", "s.csv"], "empty: holds no images (.apng, "),
        (["only", "--out", "s.csv"], "only: holds no images; did you mean 'only/t.parquet'?"),
        (["images/3.txt", "--out", "s.csv"], "images/3.txt: not known to hold images"),
        (["bad.jsonl", "--out", "s.csv"], "bad.jsonl: line 2 is not JSON"),
        (["bad.csv", "--out", "s.csv"], "bad.csv: line 2 has not as many fields"),
        (["other.csv", "--out", "s.csv"], "other.csv: no column 'image'; found 'a', 'b'"),
        (["cut.tar", "--out", "s.csv"], "cut.tar: damaged or cut off tar"),
        (["images", "--rewards", "test-rednes", "--out", "s.csv"], "did you mean 'test-redness'"),
        (
            ["images", "--rewards", "test-redness,test-steps", "--out", "s.csv"],
            "'test-steps' videos; score them in two",
        ),
        (["images", "--rewards", "test-steps", "--out", "s.csv"], "images: holds no videos"),
        (["images", "--out", "s.csv", "--option", "test-redness.x=1"], "has no option 'x'"),
        (["images", "--out", "s.csv", "--grid", "g.jpg"], "name the file g.png"),
        (["images", "--out", "s.csv", "--device", "gpu"], "--device gpu: "),
        (["images", "--out", "s.csv", "--frames", "2", "--fps", "2"], "not allowed with"),
    ],
)
def test_wrong_input_is_one_line(folder, arguments, message, capsys):
    Path("empty").mkdir()
    Path("only").mkdir()
    write_tar("t.tar")
    Path("cut.tar").write_bytes(Path("t.tar").read_bytes()[:2000])
    pq.write_table(pa.table({"a": [1]}), "only/t.parquet")
    Path("bad.jsonl").write_text('{"image": "images/0.png"}\n{oops\n')
    Path("bad.csv").write_text("image,prompt\nimages/0.png\n")
    Path("other.csv").write_text("a,b\n1,2\n")
    rewards = [] if "--rewards" in arguments else ["--rewards", "test-redness"]
    assert main(["score", *arguments, *rewards]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_tar_is_only_read(folder, tmp_path):
    with tarfile.open("evil.tar", "w") as archive:
        for name, kind in (("../outside.png", tarfile.REGTYPE), ("link.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(folder / "0.png")
            data = png(51) if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.parent.rglob("*.png"))
    assert score("evil.tar", rewards="test-redness") == 0
    assert column("id") == ["evil.tar/../outside.png"] and column("test-redness") == pytest.approx([0.2])
    assert sorted(tmp_path.parent.rglob("*.png")) == before


def test_scores_are_those_of_the_reward_itself(tmp_path, monkeypatch):
    """EXIF turns, transparency, grey and palette, mixed sizes: as `reward([path])`, and no neighbour matters."""
    monkeypatch.chdir(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save("rgba.png")
    noise.convert("L").save("grey.png")
    noise.convert("RGB").quantize(16).save("palette.png")
    noise.convert("RGB").save("turned.jpg", exif=exif)
    paths = sorted(map(str, tmp_path.glob("*.*")))

    class Corner(Reward):
        name = "test-corner"

        def score(self, media, prompts, references):
            return media[:, :, 0, :3].flatten(1) @ torch.arange(1.0, 10.0)

    register(Corner)
    assert score(".", rewards="test-corner") == 0
    assert column("test-corner") == pytest.approx([Corner()([path]).item() for path in paths], abs=1e-6)


def write_animation(path: Path, frames: int) -> None:
    images = [Image.new("RGB", (4, 4), (10 * index,) * 3) for index in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)


def test_videos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("v").mkdir()
    write_animation(Path("v/a.gif"), 10)
    (tmp_path / "frames").mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4), (51,) * 3).save(f"frames/{index}.png")
    Path("v/t.csv").write_text("video,prompt\na.gif,x\n../frames,y\n")
    command = ["score", "v/t.csv", "--rewards", "test-steps", "--grid", "g.png"]
    assert main([*command, "--out", "s.parquet"]) == 0
    assert column("test-steps") == pytest.approx([10 + 0.1 * 90 / 255, 3 + 0.02])
    assert main([*command, "--out", "t.parquet", "--frames", "2"]) == 0
    assert column("test-steps", "t.parquet") == pytest.approx([2 + 0.1 * 90 / 255, 2.02])
    assert main(["score", "v", "--rewards", "test-steps", "--out", "u.parquet", "--fps", "2"]) == 0
    assert column("test-steps", "u.parquet") == pytest.approx([2 + 0.1 * 50 / 255])  # frames 0 and 5 of ten a second
    assert main([*command, "--out", "w.parquet", "--fps", "2"]) == 2
    assert "v/t.csv#1: unreadable video (its frames have no rate; use --frames" in capsys.readouterr().err


def test_which_frames_are_taken():
    assert Frames(count=4).choose(10, None) == [0, 3, 6, 9]
    assert Frames(count=1).choose(10, None) == [5]
    assert Frames(count=12).choose(3, None) == [0, 1, 2]
    assert Frames(fps=8.0).choose(9, 24.0) == [0, 3, 6]
    assert Frames(fps=10.0).choose(5, 25.0) == [0, 2]
    assert Frames(fps=60.0).choose(3, 24.0) == [0, 1, 2]


def test_video_containers(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for index in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    levels = decode(tmp_path / "v.mp4", "video").float()
    assert levels.shape == (8, 3, 32, 32)
    assert levels.mean((1, 2, 3)).tolist() == pytest.approx([30 * index for index in range(8)], abs=4)
    some = decode((tmp_path / "v.mp4").read_bytes(), "video", Frames(fps=5.0)).float()
    assert some.mean((1, 2, 3)).tolist() == pytest.approx([0, 60, 120, 180], abs=4)


def test_the_picture_shows_best_and_worst(folder, monkeypatch):
    assert score("images", "--grid", "g.png") == 0
    shown = np.asarray(Image.open("g.png").convert("RGB"))
    green = (abs(shown[:, :, 1].astype(int) - 200) < 3) & (shown[:, :, 2] < 20)  # the pictures, whose blue is 10
    lines = np.flatnonzero(green.any(1))
    starts = [lines[0], *lines[1:][np.diff(lines) > 1]]
    first = [int(shown[row + 5, np.flatnonzero(green[row + 5])[0] + 5, 0]) for row in starts]
    # Rows: redness best, worst; wordiness best, worst, where fewer words are better.
    assert first == [LEVELS[4], LEVELS[0], LEVELS[0], LEVELS[4]]
