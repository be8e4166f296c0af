"""TempCompass: the truth table of its matching rules, its files, micro, twin and shuffle figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.core.errors import UserError
from mmalign.core.io.answers import accuracy_by, micro_accuracy, rate, shuffle_sensitivity, twin_accuracy
from mmalign.core.io.video_questions import VideoQuestion, read_tempcompass

CHOICE = "Which way is the ball moving?\nA. to the left\nB. to the right\nC. upwards"
MATCHING = "Which caption matches the video better?\nCaption A: The ball moves left.\nCaption B: The ball moves right."


def question(format_: str, text: str, answer: str, aspect: str = "direction", group: str = "g") -> VideoQuestion:
    return VideoQuestion("q", "v", aspect, format_, text, answer, group)


@pytest.mark.parametrize(
    ("response", "right", "matched"),
    [
        ("B. to the right", True, True), ("B", True, True), ("B. upwards", True, True), ("B) anything", True, True),
        ("A", False, True), ("A. to the right", False, True), (" B </s>", True, True), ("C)", False, True),
        ("(B)", False, False), ("Answer: B", False, False), ("to the right", False, False), ("b", False, False),
        ("Bananas", False, False), ("", False, False),
    ],
)  # fmt: skip
def test_multiple_choice_rules(response: str, right: bool, matched: bool) -> None:
    rating = rate(question("multi-choice", CHOICE, "B. to the right"), response)
    assert (rating.right, rating.matched) == (right, matched)


@pytest.mark.parametrize(
    ("response", "right", "matched"),
    [("yes", True, True), ("Yes, it does.", True, True), ("no", False, True), ("Not at all", False, True),
     ("It does.", False, False), ("I say yes", False, False)],
)  # fmt: skip
def test_yes_no_rules(response: str, right: bool, matched: bool) -> None:
    rating = rate(question("yes_no", "Is it moving?", "yes"), response)
    assert (rating.right, rating.matched) == (right, matched)


@pytest.mark.parametrize(
    ("response", "right", "matched"),
    [
        ("Caption B: The ball moves right.", True, True), ("Caption B", True, True), ("B", True, True),
        ("B.", True, True), ("The ball moves right.", True, True), ("B) The ball moves right.", True, True),
        ("Caption A", False, True), ("The ball moves left.", False, True), ("A.", False, True),
        ("Option B", False, False), ("The ball moves right", False, False),
    ],
)  # fmt: skip
def test_caption_matching_rules(response: str, right: bool, matched: bool) -> None:
    rating = rate(question("caption_matching", MATCHING, "Caption B: The ball moves right."), response)
    assert (rating.right, rating.matched) == (right, matched)


def test_a_judge_is_asked_only_where_no_rule_applies() -> None:
    heard: list[str] = []

    def judge(_: VideoQuestion, response: str) -> bool:
        heard.append(response)
        return True

    choice = question("multi-choice", CHOICE, "B. to the right")
    assert not rate(choice, "A", judge).right
    assert rate(choice, "(A)", judge).right and not rate(choice, "(A)").right
    assert rate(question("captioning", "Describe.", "A. x"), "A", judge).right
    assert heard == ["(A)", "A"]


def test_averages_are_over_questions() -> None:
    groups = (("speed", "1"), ("speed", "1"), ("order", "2"), ("order", "2"), ("order", "3"), ("order", "3"))
    asked = [question("yes_no", "?", "yes", aspect, group) for aspect, group in groups]
    right, shuffled = [True, False, True, True, True, False], [True, False, False, True, False, False]
    assert micro_accuracy(right) == pytest.approx(4 / 6)
    assert accuracy_by(asked, right, lambda q: q.aspect) == {"speed": 0.5, "order": 0.75}
    assert twin_accuracy(asked, right) == pytest.approx(1 / 3)
    drops = shuffle_sensitivity(asked, right, shuffled)
    assert drops == pytest.approx({"speed": 0.0, "order": 0.5, "all": 2 / 6})
    with pytest.raises(ValueError, match="no answers"):
        twin_accuracy(asked[:1], [True])


def test_official_files_are_read(tmp_path: Path) -> None:
    entry = {"question": CHOICE, "answer": "B. to the right"}
    videos = ["1034419625", "1034419625_reverse", "1059718130_concat_1", "1059072773_1059718130_2"]
    (tmp_path / "multi-choice.json").write_text(json.dumps({video: {"direction": [entry]} for video in videos}))
    (tmp_path / "yes_no.json").write_text(json.dumps({videos[0]: {"speed": [{"question": "Fast?", "answer": "no"}]}}))
    read = read_tempcompass(tmp_path)
    assert [q.video for q in read] == [*videos, videos[0]] and read[0].answer == "B. to the right"
    assert read[0].group == read[1].group != read[4].group
    assert [q.group.split("/")[1] for q in read[2:4]] == ["1059718130", "1059072773_1059718130"]
    assert read[0].prompt == CHOICE + "\nPlease directly give the best option:"
    assert read[4].prompt == "Fast?\nPlease answer yes or no:"
    assert read_tempcompass(tmp_path / "yes_no.json") == read[4:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("multichoice.json", "{}", "named after no format; did you mean 'multi-choice'"),
        ("yes_no.json", "{", "not a readable JSON file"),
        ("yes_no.json", '{"1": [1]}', "not in TempCompass's layout"),
        ("yes_no.json", '{"1": {"sped": [{"question": "?", "answer": "no"}]}}', "aspect 'sped'; did you mean 'speed'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_tempcompass(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of multi-choice.json"):
        read_tempcompass(tmp_path)
