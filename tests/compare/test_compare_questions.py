"""Comparisons of vision-language models: numbers by hand on made-up answers, and the whole way with tiny models."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import write_answer_pairs
from tiny_vlms import build_llava_onevision

from mmalign.cli import main
from mmalign.compare.report.console import print_summary
from mmalign.compare.report.page import write_report
from mmalign.compare.report.thumbnails import frame_strip
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.results import build_results
from mmalign.compare.stats import compare_paired, mean_interval, summarise
from mmalign.compare.systems.config import check_values
from mmalign.compare.systems.facts import SystemFacts
from mmalign.compare.vlm.answers import Sheet, choose_questions, write_answers
from mmalign.compare.vlm.config import QuestionConfig, load_comparison
from mmalign.compare.vlm.gallery import FRAME_SIDE, MOST_FRAMES, question_gallery
from mmalign.compare.vlm.results import families, question_numbers
from mmalign.compare.vlm.run import assemble, compare_questions
from mmalign.core.errors import UserError
from mmalign.core.io.video_files import write_video
from mmalign.core.io.video_questions import VideoQuestion
from mmalign.data.video.items import QuestionItem
from mmalign.shapes.video_set import write_video_set
from pipelines import fingerprint_vlm, load_vlm

EVIL = "</script><script>alert(1)</script> & {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    write_video_set(folder / "set", 8, split="test", seed=1, size=32)
    build_llava_onevision(folder / "a")
    build_llava_onevision(folder / "b", seed=1)
    return folder


def config_of(folder: Path, output: Path, **changes: Any) -> QuestionConfig:
    systems = [{"name": name, "model": str(folder / name)} for name in ("a", "b")]
    values = {"systems": systems, "questions": str(folder / "set"), "output": str(output), "resamples": 200}
    return check_values(QuestionConfig, values | changes)


def question(number: int, group: str, video: str, aspect: str = "order", format_: str = "yes_no") -> VideoQuestion:
    return VideoQuestion(f"q{number}", video, aspect, format_, f"{EVIL} {number}?", "yes", group)


QUESTIONS = [
    question(0, "g0", "v0"),
    question(1, "g0", "v1"),  # twin of 0
    question(2, "g1", "v0"),  # another question about v0: the same family
    question(3, "g2", "v2", "colour"),
    question(4, "g2", "v3", "colour", "multi-choice"),
    question(5, "g3", "v4", "colour", "multi-choice"),
]
RIGHT = {"base": [1, 0, 1, 1, 1, 0], "one": [1, 1, 1, 0, 1, 0], "one-seed1": [1, 1, 0, 1, 1, 1]}
SHUFFLED = {"base": [1, 0, 1, 1, 1, 0], "one": [0, 0, 1, 0, 1, 0], "one-seed1": [0, 1, 0, 1, 1, 1]}


def made_up(tmp_path: Path) -> tuple[QuestionConfig, list[QuestionItem], dict[str, Sheet], Comparison]:
    """Two systems, one trained from two seeds, whose answers are given."""
    import torch

    for number in range(5):
        write_video(tmp_path / f"v{number}.mkv", torch.full((10, 3, 16, 16), 40 * number, dtype=torch.uint8))
    asked = [QuestionItem(one.id, tmp_path / f"{one.video}.mkv", one.prompt, question=one) for one in QUESTIONS]
    systems = [{"name": "base", "model": "b"}, {"name": "one", "train": "x"}]
    values = {"systems": systems, "questions": "set", "output": str(tmp_path), "training_seeds": [0, 1]}
    config = check_values(QuestionConfig, values | {"resamples": 200})
    facts = {name: SystemFacts(name, f"runs/{EVIL}", 1.0, name * 8) for name in RIGHT}
    sheets = {
        name: Sheet([EVIL if yes else "no" for yes in right], [bool(yes) for yes in right],
                    ["?"] * 6, [bool(yes) for yes in SHUFFLED[name]])
        for name, right in RIGHT.items()
    }  # fmt: skip
    return config, asked, sheets, assemble(config, asked, facts, sheets)


def test_families_are_linked_by_videos_and_twins() -> None:
    assert families(QUESTIONS) == ["g0", "g0", "g0", "g2", "g2", "g3"]
    chain = [question(0, "a", "v0"), question(1, "b", "v1"), question(2, "c", "v0"), question(3, "b", "v0")]
    assert families(chain) == ["a"] * 4


def test_families_of_shapes_are_those_that_drew_it(room: Path, tmp_path: Path) -> None:
    asked = choose_questions(config_of(room, tmp_path))
    drawn = [one.question.video.rpartition("-")[0] for one in asked]
    found = families([one.question for one in asked])
    assert len(set(found)) == len(set(drawn)) > 1 and len(set(zip(found, drawn, strict=True))) == len(set(drawn))


def test_a_resample_of_families_is_a_ratio() -> None:
    values, units = np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]
    # Two families drawn twice: both a (mean 1), both b (mean 0), or one each (3 of 4 right); 1/4, 1/4, 1/2.
    low, high = mean_interval(values, units=units, resamples=4000) or (None, None)
    assert (low, high) == (0.0, 1.0)
    assert summarise(values[:, None], units=units).mean == 0.75
    assert mean_interval(values, units=["a"] * 4) is None
    everywhere = mean_interval(np.ones(4), units=units)
    assert everywhere == (1.0, 1.0)  # whatever the sizes of the families drawn
    each = [str(row) for row in range(6)]
    scores, other = np.random.default_rng(0).normal(size=(2, 6, 1))
    assert compare_paired(scores, other, units=each) == compare_paired(scores, other)
    quartiles = mean_interval(values, units=units, resamples=4000, level=0.4)
    assert quartiles == (0.75, 0.75)


def test_numbers_by_hand(tmp_path: Path) -> None:
    config, asked, _, comparison = made_up(tmp_path)
    results = build_results(comparison)
    base, one = (results["systems"][name] for name in ("base", "one"))
    assert base["rewards"]["accuracy"]["mean"] == pytest.approx(4 / 6)
    assert one["rewards"]["accuracy"]["mean"] == pytest.approx((4 + 5) / 12)
    assert one["rewards"]["accuracy"]["by_category"] == {"order": pytest.approx(5 / 6), "colour": pytest.approx(4 / 6)}
    versus = one["versus_baseline"]["accuracy"]
    assert versus["delta"] == pytest.approx(9 / 12 - 4 / 6)
    # Question 1 twice, and 5 once, are won; 3 of seed 0 and 2 of seed 1 are lost.
    assert (versus["wins"], versus["losses"], versus["ties"]) == (3, 2, 7)
    assert one["training_seeds"]["1"]["versus_baseline"]["accuracy"]["delta"] == pytest.approx(1 / 6)
    assert versus["delta_sd"] == pytest.approx(np.std([0, 1 / 6], ddof=1))
    drop = one["rewards"]["shuffle sensitivity"]
    assert drop["mean"] == pytest.approx((2 + 1) / 12) and drop["by_category"]["colour"] == 0
    assert base["rewards"]["shuffle sensitivity"]["mean"] == 0
    assert results["verdicts"]["one"]["versus_baseline"]["held_out"] == ["accuracy"]
    numbers = question_numbers(comparison, QUESTIONS, "set")
    assert numbers["families"] == 3
    by_format = numbers["by_format"]
    assert {name: part["count"] for name, part in by_format.items()} == {"yes_no": 4, "multi-choice": 2}
    assert by_format["multi-choice"]["systems"]["one"]["mean"] == pytest.approx(3 / 4)
    assert by_format["multi-choice"]["systems"]["one"]["versus_baseline"]["delta"] == pytest.approx(1 / 4)
    by_kind = numbers["by_kind"]
    assert {name: part["count"] for name, part in by_kind.items()} == {"temporal": 3, "static": 3}
    assert by_kind["temporal"]["systems"]["one"]["mean"] == pytest.approx(5 / 6)
    assert by_kind["temporal"]["systems"]["one"]["versus_baseline"]["delta"] == pytest.approx(1 / 6)
    assert by_kind["static"]["systems"]["base"]["mean"] == pytest.approx(2 / 3)
    twins = numbers["twins"]["systems"]
    # Groups g0 and g2: base has g2; seed 0 has g0, seed 1 both.
    assert numbers["twins"]["count"] == 2
    assert (twins["base"]["mean"], twins["one"]["mean"]) == (0.5, 0.75)
    assert twins["one"]["versus_baseline"]["delta"] == 0.25


class Elements(HTMLParser):
    """Counts elements and collects text by class."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._classes = (dict(attrs).get("class") or "").split()

    def handle_data(self, data: str) -> None:
        for name in self._classes:
            self.texts.setdefault(name, []).append(data)
        self._classes = []


def test_the_report_shows_frames_and_marked_answers_and_no_data_becomes_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, asked, sheets, comparison = made_up(tmp_path)
    results = build_results(comparison)
    results["questions"] = question_numbers(comparison, QUESTIONS, "set")
    gallery = question_gallery(config, asked, {"base": sheets["base"], "one": sheets["one"]})
    write_report(comparison, results, "x: 1", tmp_path / "report.html", gallery)
    html = (tmp_path / "report.html").read_text()
    page = Elements()
    page.feed(html)
    assert page.tags.count("script") == 2 and "<script>alert(1)" not in html
    assert page.texts["score"] == ["right" if right[index] else "wrong"
                                   for index in range(6) for right in (RIGHT["base"], RIGHT["one"])]  # fmt: skip
    assert page.texts["answer"][:2] == [EVIL, EVIL]
    strips = [tag for tag in page.tags if tag == "img"]
    assert len(strips) == 6
    assert "{{ 7" in html and "Guidance" not in html
    print_summary(results, tmp_path / "report.html")
    out = capsys.readouterr().out
    assert "6 questions × 2 training seeds, 95 % intervals over training seeds and families of videos" in out
    assert "twin accuracy (2 groups)" in out and "multi-choice (2)" in out
    write_answers(asked, sheets, tmp_path / "answers.csv")
    lines = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert len(lines) == 18 and (lines[1]["given"], lines[1]["right"], lines[1]["right_shuffled"]) == ("no", "0", "0")


def test_a_strip_holds_eight_frames_side_by_side() -> None:
    import torch

    small = frame_strip(torch.zeros(20, 3, 16, 12, dtype=torch.uint8), MOST_FRAMES, FRAME_SIDE)
    assert (small.width, small.height, small.shrunk, small.pixelated) == (8 * 12 + 7 * 2, 16, False, True)
    large = frame_strip(torch.zeros(3, 3, 256, 512, dtype=torch.uint8), MOST_FRAMES, FRAME_SIDE)
    assert (large.width, large.height, large.shrunk, large.pixelated) == (3 * 128 + 2 * 2, 64, True, False)


def test_a_second_call_asks_nothing_and_limits_keep_twins_whole(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(room, tmp_path, limit=10, max_new_tokens=4)
    asked = choose_questions(config)
    groups = [one.question.group for one in asked]
    everything = [one.question.group for one in choose_questions(config_of(room, tmp_path))]
    assert 0 < len(asked) <= 10 and all(groups.count(group) == everything.count(group) for group in groups)
    first = compare_questions(config).results
    monkeypatch.setattr("mmalign.data.video.answering.open_vlm", None)
    second = compare_questions(config).results
    first.pop("created"), second.pop("created")
    assert json.loads(json.dumps(first)) == json.loads(json.dumps(second))
    assert load_comparison(tmp_path / "config.yaml") == config
    with pytest.raises(UserError, match="limit 1: the first group of twins has"):
        choose_questions(config_of(room, tmp_path, limit=1))


def test_a_trained_system_with_an_adapter_takes_part(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_answer_pairs(tmp_path / "data")
    recipe = {
        "model": str(room / "a"), "method": "vlm_dpo", "output": str(tmp_path / "run"),
        "data": {"pairs": str(pairs), "cache": str(tmp_path / "cache")}, "adapter": {"kind": "lora", "rank": 2},
        "trainer": {"steps": 1, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1, "warmup": 0},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(recipe))
    comparison = {
        "systems": [{"name": "base", "model": str(room / "a")}, {"name": "dpo", "train": str(tmp_path / "run.yaml")}],
        "questions": str(room / "set"), "output": str(tmp_path / "out"), "limit": 6, "max_new_tokens": 4,
        "training_seeds": [0, 1], "resamples": 100, "shuffle_seed": None,
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(json.dumps(comparison))
    assert main(["compare", str(tmp_path / "compare.yaml")]) == 0
    assert "questions × 2 training seeds" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["systems"]["dpo"]["training_seeds"]) == ["0", "1"] and list(results["rewards"]) == ["accuracy"]
    whole = load_vlm(tmp_path / "run")
    assert whole.has_adapter
    prints = {fingerprint_vlm(tmp_path / name) for name in ("run", "run-seed1")} | {fingerprint_vlm(room / "a")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--guidance", "3"], "--guidance applies to image generators"),
        (["--prompts", "p.txt"], "--prompts applies to image generators"),
        (["--guidance-control", "3", "--control-prompts", "p"], "--guidance-control applies to image generators"),
        (["--frames", "0"], "frames"),
    ],
)
def test_mistakes_on_the_command_line(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    models = [str(room / "a"), str(room / "b")]
    assert main(["compare", *models, "--questions", str(room / "set"), "--out", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err


def test_mistakes_in_a_config(room: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"frames": 4, "fps": 2.0}, "frames and fps"),
        ({"systems": [{"name": "a", "model": "a"}]}, "only 'a'"),
        ({"systems": [{"name": "a", "model": "a", "guidance": 2.0}, {"name": "b", "model": "b"}]}, "image models"),
        ({"formats": ["yes_no", "yes_no"]}, "different formats"),
        ({"baseline": "c"}, "no system is called 'c'"),
    ):
        with pytest.raises(UserError, match=said):
            config_of(room, tmp_path, **changes)
    path = tmp_path / "questions.yaml"
    path.write_text("systems: [{name: a, model: a}, {name: b, model: b}]\nquestions: q\noutput: o\nsteps: 3\n")
    with pytest.raises(UserError, match="steps"):
        load_comparison(path)
