"""Just enough English to read and vary captions: numbers, articles, plurals, and the noun phrases of a sentence.

No tagger and no model: a noun phrase is a run of words between function words, verbs and punctuation, with the article
or number before it. That holds for captions such as "a small red circle to the left of two blue rings"; of free prose
some phrases are missed or too long, and what is made from those reads oddly but stays deterministic.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_IRREGULAR = dict(
    man="men", woman="women", child="children", person="people", mouse="mice", goose="geese", foot="feet",
    tooth="teeth", ox="oxen", knife="knives", wolf="wolves", leaf="leaves", shelf="shelves", bookshelf="bookshelves",
    loaf="loaves", calf="calves", half="halves", life="lives", wife="wives", thief="thieves", elf="elves",
    scarf="scarves", house="houses", horse="horses", blouse="blouses", shoe="shoes", toe="toes", canoe="canoes",
    cookie="cookies", tie="ties", pie="pies", movie="movies", zombie="zombies", selfie="selfies", axe="axes",
    piano="pianos", photo="photos", snowman="snowmen", fireman="firemen", policeman="policemen", cactus="cacti",
    canvas="canvases",
)  # fmt: skip
_SAME = frozenset(
    "sheep fish deer moose aircraft scissors skis broccoli bison salmon shrimp series species news".split()
)
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
_PLURAL_ENDINGS = ("sses", "shes", "ches", "xes", "zes", "uses", "oes")

_AN_ANYWAY = re.compile(r"(?:hour|honest|honou?r|heir)", re.I)
_A_ANYWAY = re.compile(r"(?:uni(?!n|m)|use|usual|uk|ura|uri|ut[eio]|euro|one\b|once|ewe)", re.I)

_BREAKS = frozenset(
    "and or but nor with without of in on at to from by for into onto against over under above below beneath "
    "underneath beside besides near behind between among around inside outside through across along off up down "
    "left right next adjacent higher lower front top bottom than as like while where when that which who whose is are "
    "was were be being been has have had do does there here it its it's their his her this these those we you i they "
    "he she see sees can shows show showing containing contains sits sit sat stands stand lies lie says say made "
    "placed located drawn covered filled surrounded not no very written holds wears rides eats plays runs".split()
)
_ING_NOUNS = frozenset(
    "ring king wing string spring ceiling building painting drawing morning evening wedding clothing earring thing "
    "lightning pudding duckling sibling dumpling railing awning rendering etching".split()
)
_ARTICLES = frozenset(("a", "an", "the", "another", "each", "some"))
_MEDIA = frozenset(
    "photo photograph picture image drawing painting illustration sketch render rendering portrait scene close-up "
    "closeup view shot etching cartoon".split()
)
_GROUNDS = frozenset("background backdrop canvas".split())
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|(?<!\w)'[^']*'(?!\w)|(?<!\w)‘[^’]*’(?!\w)")


def plural(noun: str) -> str:
    """Return the plural of an English noun in the singular; of several words, that of the last."""
    first, _, last = noun.rpartition(" ")
    if first:
        return f"{first} {plural(last)}"
    if noun in _SAME:
        return noun
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh|[^aeiou]o)$", noun) else "s")


def singular(noun: str) -> str:
    """Return the singular of an English noun; one that is no plural stays as it is."""
    first, _, last = noun.rpartition(" ")
    if first:
        return f"{first} {singular(last)}"
    if noun in _SAME or noun in _IRREGULAR:
        return noun
    if noun in _SINGULAR:
        return _SINGULAR[noun]
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(_PLURAL_ENDINGS):
        return noun[:-2]
    return noun[:-1] if noun.endswith("s") and not noun.endswith(("ss", "us", "is")) else noun


def is_plural(noun: str) -> bool:
    """Tell a plural from a singular; nouns with one form for both count as singular."""
    return singular(noun) != noun


def article(word: str) -> str:
    """Return "a" or "an", by the sound that the word seems to begin with."""
    if _AN_ANYWAY.match(word):
        return "an"
    return "an" if word[:1].lower() in tuple("aeiou") and not _A_ANYWAY.match(word) else "a"


def with_right_articles(text: str) -> str:
    """Put every "a" and "an" right for the word that follows."""

    def right(match: re.Match[str]) -> str:
        return match[1] + article(match[3])[1:] + match[2] + match[3]

    return re.sub(r"\b([Aa])n?(\s+)(\w+)", right, text)


def outside_quotes(text: str, change: Callable[[str], str]) -> str:
    """Apply a change to a text, but for what stands in quotation marks."""
    pieces, position = [], 0
    for quoted in _QUOTED.finditer(text):
        pieces += [change(text[position : quoted.start()]), quoted[0]]
        position = quoted.end()
    return "".join([*pieces, change(text[position:])])


def without_quotes(text: str) -> str:
    """Return a text of the same length, with dots in place of what stands in quotation marks."""
    return _QUOTED.sub(lambda quoted: "." * len(quoted[0]), text)


def number(word: str) -> int | None:
    """Return the value of a number word up to twelve or of digits; None: it is no number."""
    word = word.lower()
    return NUMBERS.index(word) if word in NUMBERS else int(word) if word.isdecimal() and len(word) < 4 else None


@dataclass(frozen=True)
class Word:
    """A word with its place in the text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: an article or number (or None), modifiers, and the noun at its end.

    `kind` is "object", "medium" (the photo in "a photo of a cat") or "ground" (a background, a canvas).
    """

    determiner: Word | None
    words: tuple[Word, ...]
    kind: str

    @property
    def start(self) -> int:
        """Where the phrase begins, its article counted in."""
        return (self.determiner or self.words[0]).start

    @property
    def end(self) -> int:
        """Where the phrase ends."""
        return self.words[-1].end

    @property
    def head(self) -> Word:
        """The noun."""
        return self.words[-1]

    @property
    def modifiers(self) -> tuple[Word, ...]:
        """What stands between article and noun."""
        return self.words[:-1]

    @property
    def count(self) -> int | None:
        """How many are asked for; None where the text does not say."""
        if self.determiner is None:
            return None
        word = self.determiner.text.lower()
        return 1 if word in ("a", "an") else number(word)


def words(text: str) -> list[Word]:
    """Split a text into words and single signs; what stands in quotation marks is left out, as one sign each."""
    found, position = [], 0
    for quoted in [*_QUOTED.finditer(text), None]:
        stop = quoted.start() if quoted else len(text)
        found += [Word(m[0], m.start(), m.end()) for m in _WORD.finditer(text, position, stop)]
        if quoted:
            found.append(Word('"', quoted.start(), quoted.end()))
            position = quoted.end()
    return found


def phrases(text: str) -> list[Phrase]:
    """Return the noun phrases of a caption, from left to right."""
    found: list[Phrase] = []
    determiner: Word | None = None
    run: list[Word] = []

    def close(following: str) -> None:
        nonlocal determiner
        if run:
            head = singular(run[-1].text.lower())
            medium = head in _MEDIA and following in ("of", "with", "showing", "containing")
            kind = "medium" if medium else "ground" if head in _GROUNDS else "object"
            found.append(Phrase(determiner, tuple(run), kind))
        run.clear()
        determiner = None

    for word in words(text):
        lower = word.text.lower()
        if lower in _ARTICLES or (number(lower) is not None and not run):
            close(lower)
            determiner = word
        elif _breaks(lower):
            close(lower)
        else:
            run.append(word)
    close("")
    return found


def _breaks(word: str) -> bool:
    if not word[0].isalnum() or word in _BREAKS:
        return True
    return word.endswith("ing") and len(word) > 5 and word not in _ING_NOUNS
