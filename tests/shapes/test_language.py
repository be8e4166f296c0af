"""Captions and prompts: everything that is written can be read back, and what cannot be read names its words."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.core.errors import UserError
from mmalign.shapes.language import Group, Query, caption, groups_of, misspell, parse, split_of
from mmalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer
from mmalign.shapes.world import holds, sample_scene


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "a small red circle to the left of a blue ring on a navy background",
            Query((Group("circle", 1, "red", "small"), Group("ring", 1, "blue")), ((0, "left of", 1),), "navy"),
        ),
        ("three green stars", Query((Group("star", 3, "green"),))),
        ("one pink cross", Query((Group("cross", 1, "pink"),))),
        ("A circle that is large and yellow.", Query((Group("circle", 1, "yellow", "large"),))),
        ("a ring and two squares", Query((Group("ring"), Group("square", 2)))),
        (
            "a blue star next to a pink dot",
            Query((Group("star", 1, "blue"), Group("circle", 1, "pink")), ((0, "next to", 1),)),
        ),
        (
            "a cyan ring with a red star to its left",
            Query((Group("ring", 1, "cyan"), Group("star", 1, "red")), ((1, "left of", 0),)),
        ),
        ("four crimson hoops on a dark blue background", Query((Group("ring", 4, "red"),), (), "navy")),
        ("a gren sqare", Query((Group("square", 1, "green"),))),
        ("a yelow traingle", Query((Group("triangle", 1, "yellow"),))),
        (
            "a red circle, a blue star and a pink cross",
            Query((Group("circle", 1, "red"), Group("star", 1, "blue"), Group("cross", 1, "pink"))),
        ),
    ],
)
def test_prompts_are_read_as_they_are_meant(prompt: str, expected: Query) -> None:
    assert parse(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a purple elephant", "'elephant'"),
        ("red and blue", "no shape"),
        ("a circle above", "second thing"),
        ("left of a star", "one of its two"),
    ],
)
def test_what_cannot_be_read_is_an_error_naming_the_words(prompt: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        parse(prompt)


def test_every_caption_tells_the_truth_about_its_scene() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        scene = sample_scene(rng)
        text = caption(rng, scene)
        query = parse(text)
        told = sorted((g.shape, g.count, g.colour) for g in query.groups)
        assert told == sorted((g.shape, g.count, g.colour) for g in groups_of(scene)), text
        assert query.background in (None, scene.background)
        assert split_of(text) == "train"
        for a, relation, b in query.relations:
            spots = [
                next(
                    o for o in scene.objects if (o.shape, o.colour) == (query.groups[i].shape, query.groups[i].colour)
                )
                for i in (a, b)
            ]
            assert holds(relation, *((o.x, o.y, o.radius) for o in spots)), text


def test_misspelt_prompts_keep_their_meaning() -> None:
    rng, changed = np.random.default_rng(4), 0
    for _ in range(300):
        text = caption(rng, sample_scene(rng))
        wrong = misspell(rng, text, words=2)
        changed += wrong != text
        assert parse(wrong) == parse(text), (text, wrong)
    assert changed > 200


def test_each_word_is_one_token_and_captions_fit(tmp_path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    text = "a small crimson circle to the left of a blue ring on a navy background"
    assert len(tokenizer.tokenize(text)) == len(text.split())
    assert len(tokenizer.tokenize("gren")) > 1
    rng = np.random.default_rng(5)
    assert max(len(tokenizer(caption(rng, sample_scene(rng))).input_ids) for _ in range(400)) <= MAX_LENGTH
