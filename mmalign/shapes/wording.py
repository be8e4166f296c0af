"""The wording of questions about Shapes videos and of their answers, for each topic and format."""

from __future__ import annotations

from dataclasses import dataclass

from mmalign.shapes.twins import Family, kinds_of


@dataclass(frozen=True)
class Said:
    """One answer in words: an option, a statement, a yes/no question, bare information, and words that reveal it.

    words: a regular expression that a caption in lower case matches if it states the answer about the subject.
    """

    option: str
    statement: str
    yes_no: str
    information: str
    words: str


QUESTIONS = {
    "direction": ("In which direction does {0} move?", "Which way is {0} moving?", "Where is {0} heading?"),
    "speed": ("Which is faster, {0} or {1}?", "Which one moves faster, {0} or {1}?"),
    "first": ("Which shape is shown first?", "What can be seen first?"),
    "last": ("Which shape is shown last?", "What can be seen last?"),
    "growth": ("What happens to the size of {0}?", "How does the size of {0} change?"),
    "recolouring": ("What happens to the colour of {0}?", "How does the colour of {0} change?"),
    "motion": ("What is {0} doing?", "How does {0} move?", "What does {0} do?"),
    "presence": ("What happens to {0}?", "When can {0} be seen?"),
    "colour": ("What colour is {0}?", "What is the colour of {0}?"),
    "shape": ("Which shape is {0}?", "What kind of shape is {0}?"),
    "count": ("How many shapes are there?", "How many shapes can be seen?"),
}
"""Wordings of each topic; {0} and {1} are the names of the subject."""

_DIRECTIONS = {
    "left": ("to the left", r"\bleft\b"), "right": ("to the right", r"\bright\b"),
    "up": ("upwards", r"\bup(?:wards?)?\b"), "down": ("downwards", r"\bdown(?:wards?)?\b"),
}  # fmt: skip
_STILL = r"\bnot move\b|\bstands? still\b|\bstays? still\b|\bnot moving\b"
# verb as in "it ...", verb as in "does it ...", words
_VERBS = {
    ("growth", "grows"): ("gets bigger", "get bigger", r"\bbigger\b|\bgrow"),
    ("growth", "shrinks"): ("gets smaller", "get smaller", r"\bsmaller\b|\bshrink"),
    ("growth", "same"): ("keeps its size", "keep its size", r"\bkeeps? its size\b|\bsame size\b"),
    ("recolouring", "same"): ("keeps its colour", "keep its colour", r"\bkeeps? its colou?r\b|\bsame colou?r\b"),
    ("motion", "straight"): ("moves straight on", "move straight on", r"\bstraight\b"),
    ("motion", "bounces"): ("turns back half-way", "turn back half-way", r"\bturns? back\b|\bbounces?\b"),
    ("motion", "shakes"): ("shakes to and fro", "shake to and fro", r"\bshakes?\b|\bshaking\b"),
    ("presence", "appears"): ("appears half-way", "appear half-way", r"\bappears?\b"),
    ("presence", "disappears"): ("disappears half-way", "disappear half-way", r"\bdisappears?\b"),
    ("presence", "hides"): ("hides and comes back", "hide and come back", r"\bhides?\b|\bcomes? back\b"),
    ("presence", "flashes"): ("shows up in between", "show up in between", r"\bin between\b"),
}


def name_of(family: Family, subject: str) -> str:
    """The name of a subject in questions: "the red circle", without words that reveal the answer.

    The colour is left out where it is the answer or changes; of topic `shape` the subject is itself a colour.
    """
    if family.topic == "shape":
        return f"the {subject} shape"
    colours = {colour for colour, shape in kinds_of(family.scenes) if shape == subject}
    return f"the {colours.pop()} {subject}" if len(colours) == 1 else f"the {subject}"


def say(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    """Word one answer to a topic about `subject`, which questions call `names`.

    Raises:
        KeyError: the topic has no such value.
    """
    return _SAYERS.get(topic, _say_verb)(topic, value, subject, names)


def _statement(who: str, does: str, do: str, option: str, words: str) -> Said:
    text = f"{who} {does}"
    return Said(option, f"{_capital(text)}.", f"Does {who} {do}?", text.removeprefix("the "), words)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _say_verb(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    if value == "still":
        return _statement(names[0], "does not move", "stand still", "it does not move", _STILL)
    if topic == "recolouring" and value != "same":
        before, after = value.split(" to ")
        change = f"from {before} to {after}"
        return _statement(names[0], f"turns {change}", f"turn {change}", change, rf"\b{before} to {after}\b")
    does, do, words = _VERBS[topic, value]
    return _statement(names[0], does, do, f"it {does}", words)


def _say_direction(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    if value == "still":
        return _say_verb(topic, value, subject, names)
    phrase, words = _DIRECTIONS[value]
    return _statement(names[0], f"moves {phrase}", f"move {phrase}", phrase, words)


def _say_speed(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    if value == "equal":
        text = f"{names[0]} and {names[1]} move equally fast"
        asked = f"Do {names[0]} and {names[1]} move equally fast?"
        return Said(
            "both are equally fast", f"{_capital(text)}.", asked, "both move equally fast", r"\bequally fast\b"
        )
    who, other = names if value == subject[0] else names[::-1]
    bare = who.removeprefix("the ")
    words = rf"\b{bare} (?:moves|is)(?: much)? faster\b|\b{other.removeprefix('the ')} (?:moves|is)(?: much)? slower\b"
    return _statement(who, f"moves faster than {other}", f"move faster than {other}", who, words)


def _say_order(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    who = names[subject.index(value)]
    text = f"{who} is shown {topic}"
    words = rf"\b{who.removeprefix('the ')} (?:is shown|comes|appears|is seen) {topic}\b"
    return Said(who, f"{_capital(text)}.", f"Is {who} shown {topic}?", text.removeprefix("the "), words)


def _say_what(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    phrase = value if topic == "colour" else ("an " if value[0] in "aeiou" else "a ") + value
    text = f"{names[0]} is {phrase}"
    return Said(value, f"{_capital(text)}.", f"Is {names[0]} {phrase}?", text.removeprefix("the "), rf"\b{value}\b")


def _say_count(topic: str, value: str, subject: tuple[str, ...], names: tuple[str, ...]) -> Said:
    are = f"is {value} shape" if value == "one" else f"are {value} shapes"
    words = rf"\b{value}\b|\ba single\b" if value == "one" else rf"\b{value}\b"
    verb, number = are.split(" ", 1)
    return Said(value, f"There {are}.", f"{_capital(verb)} there {number}?", number, words)


_SAYERS = {
    "direction": _say_direction, "speed": _say_speed, "first": _say_order, "last": _say_order,
    "colour": _say_what, "shape": _say_what, "count": _say_count,
}  # fmt: skip
