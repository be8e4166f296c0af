"""Questions about Shapes videos: exact answers, nothing to gain from the text, captions judged by rules."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from mmalign.core.io.answers import rate
from mmalign.core.io.video_questions import FORMATS, TOPICS
from mmalign.shapes.questions import ShapesQuestion, ask, judge_caption
from mmalign.shapes.tracking import follow
from mmalign.shapes.twins import Family, sample_families
from mmalign.shapes.video import Actor, VideoScene, render, reverse, unroll


@pytest.fixture(scope="module")
def asked() -> list[tuple[Family, list[ShapesQuestion]]]:
    families = sample_families(4 * len(TOPICS), "validation", 2)
    return [(family, ask(family, f"v{number}")) for number, family in enumerate(families)]


def test_every_answer_is_the_truth_of_its_video(asked: list[tuple[Family, list[ShapesQuestion]]]) -> None:
    for family, questions in asked:
        for question in questions:
            scene = family.scenes[question.member]
            assert question.answer_of(unroll(scene), scene.size) == question.answer
            assert question.aspect == TOPICS[family.topic]
            if question.format in ("multi-choice", "caption_matching"):
                assert question.answer in question.text.split("\n")[1:]


def test_every_video_is_asked_in_every_format(asked: list[tuple[Family, list[ShapesQuestion]]]) -> None:
    for family, questions in asked:
        pairs = {(question.member, question.format) for question in questions}
        assert pairs == {(member, name) for member in range(len(family.scenes)) for name in FORMATS}
        assert len({question.id for question in questions}) == len(questions)


def test_the_text_alone_says_nothing_about_the_answer(asked: list[tuple[Family, list[ShapesQuestion]]]) -> None:
    """Given aspect, format and the whole text, every answer on offer is right exactly as often as any other."""
    answers: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    offered: dict[tuple[str, str, str], set[str]] = {}
    for _, questions in asked:
        for question in questions:
            key = (question.aspect, question.format, question.group)
            answers[key].append(question.answer)
            offered[key] = {answer for _, answer in question.answers}
    assert {key[:2] for key in answers} == {(aspect, name) for aspect in TOPICS.values() for name in FORMATS}
    for key, given in answers.items():
        assert Counter(given) == {answer: 1 for answer in offered[key]}


def test_letters_and_labels_are_not_a_prior_either() -> None:
    letters: dict[str, Counter[str]] = defaultdict(Counter)
    for number, family in enumerate(sample_families(300, "train", 8, topics=["motion"])):
        for question in ask(family, f"m{number}", formats=("multi-choice",)):
            if question.member == 0:
                letters["first value"][question.answer[0]] += 1
    share = {letter: count / 300 for letter, count in letters["first value"].items()}
    assert sorted(share) == list("ABCD") and all(abs(value - 0.25) < 0.09 for value in share.values())


def test_a_reversed_video_turns_its_direction_answers_and_keeps_its_colour() -> None:
    scene = VideoScene((Actor("ring", "cyan", 5.5, 9.0, 30.0, "left", 2.0),), "black", 8, 48)
    direction = Family("direction", ("ring",), (scene, reverse(scene)), ("left", "right"))
    colour = Family("colour", ("ring",), (scene, scene), ("cyan", "red"))
    backwards = follow(render(scene).flip(0))
    for question in ask(direction, "d"):
        if question.member == 0:
            twin = next(q for q in ask(direction, "d") if q.group == question.group and q.member == 1)
            assert question.answer_of(backwards, 48) == twin.answer != question.answer
    for question in ask(colour, "c"):
        if question.member == 0:
            assert question.answer_of(backwards, 48) == question.answer


def test_a_question_has_no_answer_where_the_frames_show_none() -> None:
    scene = VideoScene((Actor("ring", "cyan", 5.5, 9.0, 30.0, "left", 2.0),), "black", 8, 48)
    question = ask(Family("direction", ("ring",), (scene, reverse(scene)), ("left", "right")), "d")[0]
    track = unroll(scene)[0]
    assert question.answer_of([tuple(track[i] for i in (4, 5, 6, 7, 0, 1, 2, 3))], 48) is None
    assert question.answer_of([(None,) * 8], 48) is None


def test_a_label_before_the_words_of_another_option_is_wrong(
    asked: list[tuple[Family, list[ShapesQuestion]]],
) -> None:
    for question in (one for _, questions in asked for one in questions if one.format == "caption_matching"):
        (label, words), (other, _) = (line.split(": ", 1) for line in question.text.split("\n")[1:])
        right = question.answer == f"{label}: {words}"
        assert rate(question, f"{label}: {words}", judge_caption).right == rate(question, label).right == right
        assert question.label == (label if right else other)
        assert not rate(question, f"{other}: {words}", judge_caption).right


def test_the_information_of_the_true_option_is_a_right_caption_and_no_other_is(
    asked: list[tuple[Family, list[ShapesQuestion]]],
) -> None:
    for _, questions in asked:
        for question in questions:
            if question.format != "captioning":
                continue
            lines = [line for line in question.text.split("\n") if line.startswith("Information ")]
            for line in lines:
                letter, information = line.removeprefix("Information ").split(": ", 1)
                for caption in (information, f"The video: the {information}!", information.upper()):
                    assert judge_caption(question, caption) == (letter == question.answer[0])
            everything = " . ".join(line.split(": ", 1)[1] for line in lines)
            assert not judge_caption(question, everything) and not judge_caption(question, "a video of shapes")


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("the cyan ring moves to the left", True),
        ("a cyan ring is moving left while the red star moves to the right", True),
        ("the red star moves to the left", False),
        ("the cyan ring moves to the left and then the cyan ring moves to the right", False),
        ("the cyan ring does not move", False),
        ("", False),
    ],
)
def test_captions_are_judged_by_what_they_say_of_the_subject(caption: str, right: bool) -> None:
    scene = VideoScene((Actor("ring", "cyan", 5.5, 9.0, 30.0, "left", 2.0),), "black", 8, 48)
    still = VideoScene((Actor("ring", "cyan", 5.5, 9.0, 30.0),), "black", 8, 48)
    family = Family("direction", ("ring",), (scene, reverse(scene), still), ("left", "right", "still"))
    question = next(q for q in ask(family, "d", formats=("captioning",)) if q.member == 0)
    assert judge_caption(question, caption) is right


def test_questions_depend_on_name_and_seed_alone() -> None:
    family = next(sample_families(1, "train", 4))
    assert ask(family, "a") == ask(family, "a")
    assert [q.text for q in ask(family, "a")] != [q.text for q in ask(family, "b")]
    assert [q.text for q in ask(family, "a", 1)] != [q.text for q in ask(family, "a", 2)]
