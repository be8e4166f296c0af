"""Whether an answer in free words is the expected one: rules for yes and no, letters of options, numbers and text.

They are for choosing training data, so an answer that no rule can decide is neither right nor wrong. The accuracies of
an evaluation follow `mmalign.core.io.answers`, TempCompass's own rules.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_NEGATIONS = {"no", "not", "never", "none", "nothing", "neither", "nor", "without"}
_JOINING = _NEGATIONS | {"and", "or", "then", "but", "instead", "either", "before", "after", "from"}
"""Words with which an answer says more than the expected one, or its contrary."""
_WORD = re.compile(r"\d+(?:\.\d+)?|\w+")
_LEAD = re.compile(
    r"\s*(?:the\s+)?(?:(?:final|correct|best|right)\s+)?"
    r"(?:answer|option|choice|caption|sentence|statement|description)\b(?:\s+is)?:?\s*",
    re.I,
)
_LETTER = re.compile(r"\s*\(?([a-h])(?:[).:,]+\s*|\s*$)(.*)", re.I | re.S)
_LETTER_AFTER_LEAD = re.compile(r"\(?(?:([b-h])\b[).:,]*\s*|(a|\d)(?:[).:,]+\s*|\s*$))(.*)", re.I | re.S)
_PERHAPS_LETTER = re.compile(r"A\s+\w")
"""After "The answer is": an option, or an article in capitals."""


def match_answer(given: str, expected: str) -> bool | None:
    """Tell whether an answer is the expected one; None if the rules cannot decide.

    Case, punctuation, articles and the spelling of small numbers do not count:

        match_answer("Yes, the man is running.", "yes")     # True
        match_answer("(b)", "B. to the left")               # True
        match_answer("There are three balls.", "3")         # True
        match_answer("to the right", "B. to the left")      # False
        match_answer("He might be.", "yes")                 # None
    """
    said, wanted = _words(given), _words(expected)
    if not said or not wanted:
        return None if not wanted else False
    if said == wanted:
        return True
    letter, text = _option(expected)
    if letter:
        return _match_option(given, letter, text)
    if wanted[0] in ("yes", "no"):
        return _match_polarity(_words(_LEAD.sub("", given, count=1)) or said, wanted)
    if len(wanted) == 1 and wanted[0][0].isdigit():
        numbers = {word for word in said if word[0].isdigit()}
        return numbers == {wanted[0]} if len(numbers) == 1 and not set(said) & _JOINING else None
    return _match_text(said, wanted)


def _words(text: str) -> list[str]:
    lowered = unicodedata.normalize("NFKC", text).lower().replace("’", "'").replace("</s>", " ")
    words = _WORD.findall(re.sub(r"n't\b|(?<=\bcan)not\b", " not", lowered))
    return [_DIGITS.get(word, word) for word in words if word not in _ARTICLES] or words


def _option(text: str) -> tuple[str, str]:
    """Return the letter of an option and its text, "B. to the left"; the letter is empty if there is none."""
    lead = _LEAD.match(text)
    found = _LETTER_AFTER_LEAD.match(text, lead.end()) if lead else _LETTER.match(text)
    if not found:
        return "", text
    *letters, rest = found.groups()
    return next(letter.lower() for letter in letters if letter), rest


def _match_option(given: str, letter: str, text: str) -> bool | None:
    said_letter, said_text = _option(given)
    if said_letter == letter:
        return True
    if said_letter:
        return None if _words(text) and _words(said_text) == _words(text) else False
    if not text.strip():
        return None
    lead = _LEAD.match(given)
    open_ended = lead is not None and _PERHAPS_LETTER.match(given, lead.end()) is not None
    right = match_answer(given, text)
    return None if open_ended and right is False else right


def _match_polarity(said: Sequence[str], wanted: Sequence[str]) -> bool | None:
    if said[0] not in ("yes", "no"):
        return True if wanted[0] == "yes" and list(said) == wanted[1:] else None
    if said[0] != wanted[0]:
        return False
    return True if len(said) == 1 or len(wanted) == 1 or said == wanted else None


def _match_text(said: Sequence[str], wanted: Sequence[str]) -> bool | None:
    if said[0] == "yes" and said[1:] == wanted:
        return True
    at = _place(wanted, said)
    if at is not None:
        more = {*said[:at], *said[at + len(wanted) :]}
        return None if more & _JOINING else True
    if _place(said, wanted) is not None or said[0] in ("yes", "no"):
        return None
    following = iter(said)
    scattered = len(wanted) > 1 and all(word in following for word in wanted)
    return None if scattered else False


def _place(part: Sequence[str], whole: Sequence[str]) -> int | None:
    """Return where some words stand in others, side by side."""
    places = range(len(whole) - len(part) + 1)
    return next((at for at in places if list(whole[at : at + len(part)]) == list(part)), None)
