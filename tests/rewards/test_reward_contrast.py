"""Contrast prompts by rules, and the English that they rest on."""

import json
import re

import pytest
from golden_data import golden_file

from rewards.language.contrast_rules import KINDS, rule_contrast, without_duplicates
from rewards.language.english import article, number, phrases, plural, singular, with_right_articles


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "counts",
            [
                *(
                    "two small red circles to the left of a blue ring",
                    "a small red circle to the left of two blue rings",
                ),
                *(
                    "three small red circles to the left of a blue ring",
                    "a small red circle to the left of three blue rings",
                ),
                *(
                    "four small red circles to the left of a blue ring",
                    "a small red circle to the left of four blue rings",
                ),
            ],
        ),
        ("drop", ["a small red circle", "a blue ring"]),
        (
            "objects",
            [
                *("a small red square to the left of a blue ring", "a small red circle to the left of a blue cross"),
                *(
                    "a small red triangle to the left of a blue ring",
                    "a small red circle to the left of a blue circle",
                ),
                *("a small red star to the left of a blue ring", "a small red circle to the left of a blue square"),
            ],
        ),
        (
            "relations",
            [
                "a blue ring to the left of a small red circle",
                *("a small red circle to the right of a blue ring", "a small red circle above a blue ring"),
                "a small red circle below a blue ring",
            ],
        ),
        (
            "swap",
            ["a blue circle to the left of a small red ring", "a small blue circle to the left of a red ring"],
        ),
    ],
)
def test_rules_on_a_prompt_of_shapes(kind, expected):
    assert rule_contrast("a small red circle to the left of a blue ring", [kind]) == expected


def test_attributes_are_replaced_by_none_that_the_caption_has():
    made = rule_contrast("a small red circle to the left of a blue ring", ["attributes"])
    assert made[0] == "a large red circle to the left of a blue ring"
    assert [re.sub(r".* small (\w+) circle.*", r"\1", text) for text in made[1::2]] == [
        "green",
        "yellow",
        "orange",
        "purple",
    ]
    assert [re.sub(r".* an? (\w+) ring.*", r"\1", text) for text in made[2::2]] == [
        "green",
        "yellow",
        "orange",
        "purple",
    ]
    assert rule_contrast("a scarlet dot", ["attributes"])[0] == "a blue dot"
    # what a colour is called elsewhere is no colour here
    assert rule_contrast("an orange", ["attributes"]) == []
    assert rule_contrast("The apple is red.", ["attributes"])[0] == "The apple is blue."
    assert rule_contrast("a wooden table", ["attributes"])[0] == "a metal table"


@pytest.mark.parametrize(
    ("prompt", "kind", "some"),
    [
        ("two cats", "counts", ["three cats", "a cat", "four cats"]),
        ("there is a yellow hoop", "counts", ["there are two yellow hoops"]),
        ("there are two yellow hoops", "counts", ["there is a yellow hoop"]),
        ("3 sheep", "counts", ["four sheep", "two sheep"]),
        ("a realistic photo of an apple", "counts", ["a realistic photo of two apples"]),
        ("a dog right of a teddy bear", "objects", ["a horse right of a teddy bear"]),
        ("two cats and a dog", "objects", ["two dogs and a dog", "two cats and a horse"]),
        (
            "an orange square with a pink ring to its left",
            "relations",
            ["an orange square with a pink ring to its right"],
        ),
        ("an orange square with a pink ring to its left", "drop", ["an orange square", "a pink ring"]),
        ("a red square with an orange ring", "swap", ["an orange square with a red ring"]),
        ("a wooden table in front of two red chairs", "relations", ["a wooden table behind two red chairs"]),
        ("a wooden table in front of two red chairs", "swap", ["a red table in front of two wooden chairs"]),
        ("a cat on top of a large box", "relations", ["a cat below a large box"]),
        ("a small fluffy teddy bear and a mug", "swap", ["a fluffy teddy bear and a small mug"]),
        ("two red dots and a blue dot", "swap", ["two blue dots and a red dot"]),
        ("a red dot left of a blue dot", "swap", ["a blue dot left of a red dot"]),
        ("a cat that is small", "counts", ["two cats that are small"]),
        ("a red square next to a blue ring", "drop", ["a red square", "a blue ring"]),
        ("a star on a dark background", "attributes", ["a star on a light background"]),
    ],
)
def test_rules_in_general(prompt, kind, some):
    made = rule_contrast(prompt, [kind])
    assert [text for text in some if text not in made] == [], made


@pytest.mark.parametrize(
    ("prompt", "kind", "made"),
    [
        ("a red dot and a blue dot", "swap", []),
        ("a dot that is orange", "objects", ["a square that is orange", "a triangle that is orange"]),
        ("a dot on a gray canvas", "counts", ["two dots on a gray canvas", "three dots on a gray canvas"]),
    ],
)
def test_what_would_say_the_same_or_nothing_is_left_out(prompt, kind, made):
    assert rule_contrast(prompt, [kind])[:2] == made
    assert not any("carrot" in text or "two gray" in text for text in rule_contrast(prompt))


def test_what_is_quoted_is_never_touched():
    prompt = "A red sign that says 'a  apple above it' and a cat"
    made = rule_contrast(prompt)
    assert len(made) > 5 and all("'a  apple above it'" in text for text in made if "sign" in text)


def test_drawing_is_fair_limited_and_deterministic():
    prompt = "a small red circle to the left of a blue ring"
    made = rule_contrast(prompt)
    assert len(made) == 24 == len(set(made)) and made == rule_contrast(prompt) and prompt not in made
    assert rule_contrast(prompt, limit=6) == made[:6] == [rule_contrast(prompt, [kind])[0] for kind in KINDS]
    assert rule_contrast("") == rule_contrast("melancholy of the sea") == []


def test_duplicates_are_of_one_sense():
    assert without_duplicates("A cat.", ["a  cat", "a dog", "A dog.", "two cats"]) == ["a dog", "two cats"]


def test_english():
    nouns = ["circle", "cross", "box", "bench", "toothbrush", "cherry", "toy", "knife", "person", "sheep", "bus"]
    many = [
        "circles",
        "crosses",
        "boxes",
        "benches",
        "toothbrushes",
        "cherries",
        "toys",
        "knives",
        "people",
        "sheep",
        "buses",
    ]
    assert [plural(noun) for noun in nouns] == many and [singular(noun) for noun in many] == nouns
    assert plural("teddy bear") == "teddy bears" and singular("wine glasses") == "wine glass"
    assert [singular(noun) for noun in ("species", "series", "canvases")] == ["species", "series", "canvas"]
    words = ["orange", "hour", "unicorn", "umbrella", "uniform", "uninvited", "ukulele", "one", "eel", "utensil"]
    assert [article(word) for word in words] == ["an", "an", "a", "an", "a", "an", "a", "a", "an", "a"]
    assert with_right_articles("An cat, a owl and a an hour") == "A cat, an owl and an an hour"
    assert [number(word) for word in ("one", "Twelve", "3", "many", "1000")] == [1, 12, 3, None, None]
    found = phrases("a photo of two red dogs sitting on an old couch against a white wall, painting")
    assert [(p.count, " ".join(w.text for w in p.words), p.kind) for p in found] == [
        *((1, "photo", "medium"), (2, "red dogs", "object"), (1, "old couch", "object"), (1, "white wall", "object")),
        (None, "painting", "object"),
    ]


def test_published_counting_contrasts_are_among_ours():
    table = json.loads(golden_file("../prompts/textnorm/prompt_set_counting.json").read_text())
    theirs = [(prompt, other) for prompt, contrast in table.items() for other in contrast]
    missed = [(prompt, other) for prompt, other in theirs if other not in rule_contrast(prompt, ["counts"])]
    assert len(theirs) > 100 and missed == []


def test_published_composition_contrasts_of_their_rules_are_among_ours():
    table = json.loads(golden_file("../prompts/textnorm/prompt_set_composition.json").read_text())
    missed = []
    for prompt, contrast in table.items():
        ours = rule_contrast(prompt, ["counts", "drop"])
        # one thing dropped, or one of two things doubled or tripled; the others change both, or are a model's
        missed += [(prompt, other) for other in [*contrast[:4], *contrast[5:7]] if other not in ours]
    assert len(table) == 300 and missed == []
