"""A third party's set of videos and language of captions, joined by entry points: read, perturbed and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny_runs import write_pairs
from tiny_vlms import build_llava_onevision

from mmalign.cli import main
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.decode import ALL_FRAMES
from mmalign.core.io.question_sets import SetVideo
from mmalign.core.io.video_files import write_video
from mmalign.core.io.video_questions import VideoQuestion
from mmalign.data.building.captions import perturb_captions
from mmalign.data.labels import read_labels
from mmalign.data.video.items import is_video_source, load_video_questions, read_video_items
from mmalign.data.video.operators import Effect
from mmalign.data.video.perturbations import Perturbation
from mmalign.data.video.reading import VideoReader

LEVELS = [0, 0, 0, 120, 120, 120, 250, 250]  # three shots; the picture becomes brighter


@dataclass(frozen=True)
class Lamp:
    """What is true of a video of one grey level a frame."""

    levels: tuple[int, ...]

    @property
    def frames(self) -> int:
        return len(self.levels)

    def states(self) -> list[Hashable]:
        return [level // 100 for level in self.levels]

    def answer(self, question: VideoQuestion, order: Sequence[int]) -> str | None:
        shown = [self.levels[index] for index in order]
        if shown[0] == shown[-1]:
            return None
        return "yes" if (shown[-1] > shown[0]) == ("brighter" in question.text) else "no"

    def fact(self, question: VideoQuestion) -> tuple[str, str | None]:
        return "growth", "grows" if self.levels[-1] > self.levels[0] else "shrinks"


class Lamps:
    """Videos that become brighter or darker: a folder with lamps.json, name -> levels."""

    layout = "a folder with lamps.json"
    judge = None

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.lamps = {name: Lamp(tuple(one)) for name, one in json.loads((path / "lamps.json").read_text()).items()}

    @staticmethod
    def holds(path: Path) -> bool:
        return (path / "lamps.json").is_file()

    def videos(self) -> list[SetVideo]:
        return [SetVideo(name, self.folder / f"{name}.mkv", lamp) for name, lamp in self.lamps.items()]

    def questions(self) -> list[VideoQuestion]:
        return [
            VideoQuestion(f"{name}/{way}", name, "attribute_change", "yes_no", f"Does it become {way}?",
                          str(lamp.answer(VideoQuestion("", "", "", "", way, "", ""), range(lamp.frames))), way)
            for name, lamp in self.lamps.items()
            for way in ("brighter", "darker")
        ]  # fmt: skip


def louder(caption: str) -> dict[str, list[str]]:
    if not caption.startswith("a "):
        raise UserError(f"cannot read {caption!r}")
    return {"number": [f"no{caption[1:]}"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of three lamps, and both entry points as pip leaves them."""
    info = tmp_path / "site" / "lamps-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamps\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmalign.question_sets]\nlamps = lamps_for_tests:Lamps\n"
        "[mmalign.false_captions]\nlouder = lamps_for_tests:louder\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(sys.modules, "lamps_for_tests", sys.modules[__name__])
    lamps = {"up": LEVELS, "down": LEVELS[::-1], "on": [10, *[240] * 7]}
    made = tmp_path / "set"
    for name, levels in lamps.items():
        frames = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 16, 16)
        write_video(made / f"{name}.mkv", frames)
    (made / "lamps.json").write_text(json.dumps(lamps))
    return made


def test_it_is_read(folder: Path) -> None:
    assert is_video_source(str(folder))
    items = load_video_questions(str(folder))
    assert [(item.id, item.answer) for item in items] == [
        ("up/brighter", "yes"), ("up/darker", "no"), ("down/brighter", "no"), ("down/darker", "yes"),
        ("on/brighter", "yes"), ("on/darker", "no"),
    ]  # fmt: skip
    assert items[0].prompt == "Does it become brighter?\nPlease answer yes or no:"
    assert items[0].right("Yes, it does") and not items[0].right("No.") and not items[0].right("It may.")
    reader = VideoReader(ALL_FRAMES)
    assert reader.states(items[0]) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert int(reader.show_clip(items[0], 1).media[0][0, 0, 0, 0]) == 120
    described = read_video_items(str(folder), questions=False, instructions=["Tell."])
    assert [(item.id, item.prompt, item.answer) for item in described] == [
        (name, "Tell.", None) for name in ("up", "down", "on")
    ]
    (folder / "on.mkv").unlink()
    with pytest.raises(UserError, match="2 questions are about videos that are not there, on first"):
        load_video_questions(str(folder))
    with pytest.raises(UserError, match="a folder with lamps.json, or a folder that `mmalign shapes"):
        load_video_questions(str(folder.parent))


def test_its_truth_decides_what_a_perturbation_leaves_true(folder: Path) -> None:
    items = {item.id: item for item in load_video_questions(str(folder))}
    reverse, flip, black = (Perturbation((name,)) for name in ("reverse", "flip", "black"))
    assert all(reverse.fate(item, 8, 0) is Effect.CHANGES for item in items.values())
    freeze = Perturbation(("freeze",))  # a frozen video shows neither: of "no", that is no mistake
    assert freeze.fate(items["up/brighter"], 8, 0) is Effect.CHANGES
    assert freeze.fate(items["up/darker"], 8, 0) is Effect.DEPENDS
    # The label map speaks where pictures change, or not all frames are taken.
    assert flip.fate(items["up/brighter"], 8, 0) is Effect.KEEPS
    assert black.fate(items["up/brighter"], 8, 0) is reverse.fate(items["up/brighter"], 4, 0) is Effect.CHANGES
    assert black.fate(items["up/darker"], 8, 0) is reverse.fate(items["up/darker"], 4, 0) is Effect.DEPENDS


def test_the_commands_take_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.parquet"
    truth = ["--operators", "reverse", "--chosen", "truth", "--rejected", "videos"]
    assert main(["pairs", "perturb", str(folder), "--out", str(out), *truth]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [(row["id"], row["chosen"]) for row in rows] == [
        (f"{item.id}/reverse", item.answer) for item in load_video_questions(str(folder))
    ]
    model = build_llava_onevision(tmp_path / "model")
    build_llava_onevision(tmp_path / "other", seed=1)
    command = ["compare", model, str(tmp_path / "other"), "--questions", str(folder), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # Two groups, each of three videos that all the questions link: one family.
    assert results["questions"]["by_format"]["yes_no"]["count"] == 6
    assert results["questions"]["twins"]["count"] == 2 and results["questions"]["families"] == 1
    (tmp_path / "captions.yaml").write_text(
        f"systems: [{{name: a, model: {model}}}, {{name: b, model: {tmp_path / 'other'}}}]\n"
        f"questions: {folder}\noutput: {tmp_path / 'out2'}\nformats: [yes_no, captioning]\n"
    )
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "captions.yaml")]) == 2
    assert f"captioning needs a judge, and {folder} has none" in capsys.readouterr().err


def test_its_language_of_captions(folder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, 3)
    table = read_labels(str(pairs), DataConfig(labels=str(pairs)))
    assert perturb_captions(table, tmp_path / "out.parquet", "louder").edits == {"number": 3}
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["caption_rejected"] for row in rows] == ["no blue circle", "no red circle", "no blue circle"]
    pairs.write_text(pairs.read_text().replace("a red", "two red"))
    table = read_labels(str(pairs), DataConfig(labels=str(pairs)))
    with pytest.raises(UserError, match="cannot read 'two red circle'; for other captions give --contrast rules"):
        perturb_captions(table, tmp_path / "out.parquet", "louder")
