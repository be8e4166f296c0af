"""The language of Shapes: captions written from scenes, and prompts parsed into queries.

:func:`caption` words a scene with many templates and synonyms; :func:`parse` reads any caption of that grammar (and
misspelt words within one or two edits) into a :class:`Query`. A prompt that cannot be read is an error that names the
words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmalign.core.errors import UserError
from mmalign.shapes.world import INVERSE, RELATIONS, Scene

NUMBERS = ("one", "two", "three", "four")

# Every word's first spelling is the common one, the last is rare in training (about one use in fifty).
SHAPE_WORDS = {
    "circle": ("circle", "dot", "disk"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid", "wedge"),
    "star": ("star", "pentagram", "starlet"),
    "ring": ("ring", "hoop", "donut"),
    "cross": ("cross", "plus", "crucifix"),
}
COLOUR_WORDS = {
    "red": ("red", "scarlet", "crimson"),
    "green": ("green", "grassy", "emerald"),
    "blue": ("blue", "azure", "cobalt"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "plum"),
    "orange": ("orange", "amber", "tangerine"),
    "cyan": ("cyan", "aqua", "turquoise"),
    "pink": ("pink", "rose", "bubblegum"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS = {
    "white": ("white", "pale", "snowy"),
    "black": ("black", "dark", "inky"),
    "gray": ("gray", "grey", "slate"),
    "navy": ("navy", "midnight", "marine"),
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
    "next to": ("next to", "beside", "adjacent to"),
}
TRAILING_RELATIONS = {"to its left": "left of", "to its right": "right of", "above it": "above", "below it": "below"}
"""`X with Y to its left`: the second thing named stands in the relation to the first."""
_FILLERS = (
    "a picture of|an image of|a drawing of|a painting of|a photo of|picture|image|drawing|painting|photo|scene|"
    "there is|there are|we see|we can see|shows|showing|show|that|which|is|are|the|this|in|it|its|of|with|on|against|"
    "background|backdrop|canvas|coloured|colored|colour|color|shape|shapes|simple|plain|containing|contains|sits|sit|"
    "placed|standing|stands|located|drawn|at|to|side|size|sized|has|have|being|everything|else|empty|where|both|visible"
).split("|")


@dataclass(frozen=True)
class Group:
    """`count` equal things; an attribute that the prompt does not name is None."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Query:
    """The content of a prompt. `relations` are (index, relation, index) over `groups`."""

    groups: tuple[Group, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


def split_of(prompt: str) -> str:
    """The split of a wording: `test` (6 %), `validation` (4 %) or `train`, by a hash of the text.

    Training captions are only ever of split `train`, so no evaluation prompt can be among them.
    """
    bucket = hashlib.sha256(" ".join(prompt.lower().split()).encode()).digest()[0]
    return "test" if bucket < 15 else "validation" if bucket < 26 else "train"


# -------------------------------------------------------------------------------------------------- writing


def pick_word(rng: np.random.Generator, words: Sequence[str], rare: float) -> str:
    """One of three spellings, the common one mostly; `rare` is the chance of the last."""
    draw = rng.random()
    return words[2] if draw < rare else words[1] if draw < 3 * rare else words[0]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def article(phrase: str) -> str:
    """The phrase with `a` or `an` before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def group_phrase(rng: np.random.Generator, group: Group, rare: float, long: bool) -> str:
    """Word a group with its article or number; `long` may put attributes behind the noun."""
    noun = pick_word(rng, SHAPE_WORDS[group.shape], rare)
    colour = pick_word(rng, COLOUR_WORDS[group.colour], rare) if group.colour else None
    size = pick_word(rng, SIZE_WORDS[group.size], rare) if group.size else None
    if group.count > 1:
        return " ".join(filter(None, (NUMBERS[group.count - 1], size, colour, _plural(noun))))
    if long and colour:
        middle = f"that is {size} and {colour}" if size and rng.random() < 0.5 else f"that is {colour}"
        head = noun if size is None or "and" in middle else f"{size} {noun}"
        return f"{article(head)} {middle}"
    phrase = " ".join(filter(None, (size, colour, noun)))
    return f"one {phrase}" if rng.random() < 0.12 else article(phrase)


_LONG = (
    "in this picture we can see {x} on {b}",
    "a simple drawing showing {x} and the background is {c}",
    "there is {x} placed on {b} and everything else is empty",
    "this is an image of {x} standing on {b}",
    "a plain picture containing {x} where the background is {c}",
)
_SHORT = (
    "{x}",
    "{x}",
    "{x}",
    "a picture of {x}",
    "an image of {x}",
    "a drawing of {x}",
    "there is {x}",
    "a scene with {x}",
)
_ON = ("on a {c} background", "against a {c} backdrop", "on a {c} canvas")


def groups_of(scene: Scene, rng: np.random.Generator | None = None, size_named: float = 0.25) -> tuple[Group, ...]:
    """The scene's objects as groups of equal things, in order of appearance, sizes named at random."""
    counts: dict[tuple[str, str], list[str]] = {}
    for item in scene.objects:
        counts.setdefault((item.shape, item.colour), []).append(item.size)
    groups = []
    for (shape, colour), sizes in counts.items():
        named = rng is not None and len(set(sizes)) == 1 and rng.random() < size_named
        groups.append(Group(shape, len(sizes), colour, sizes[0] if named else None))
    return tuple(groups)


def write(rng: np.random.Generator, query: Query, *, rare: float = 0.02, long: bool = False) -> str:
    """Word a query as a caption. `rare` is the chance of a word's rarest synonym; `long` picks wordy templates."""
    words = [group_phrase(rng, group, rare, long) for group in query.groups]
    if query.relations:
        (a, relation, b) = query.relations[0]
        trailing = [k for k, v in TRAILING_RELATIONS.items() if v == INVERSE[relation]]
        if trailing and rng.random() < (0.5 if long else 0.08):
            text = f"{words[a]} with {words[b]} {trailing[0]}"
        else:
            text = f"{words[a]} {pick_word(rng, RELATION_WORDS[relation], max(rare, 0.08))} {words[b]}"
    else:
        text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    if query.groups[0].count > 1:
        short = [t.replace("there is", "there are") for t in _SHORT]
    else:
        short = list(_SHORT)
    if query.background is None:
        return str(rng.choice(short)).format(x=text)
    colour = pick_word(rng, BACKGROUND_WORDS[query.background], rare)
    if long:
        text = (
            str(rng.choice(_LONG))
            .replace("there is", "there are" if query.groups[0].count > 1 else "there is")
            .replace("{x}", text)
        )
        return text.format(c=colour, b=f"{article(colour)} background")
    place = str(rng.choice(_ON)).format(c=colour).replace("a inky", "an inky")
    return f"{str(rng.choice(short)).format(x=text)} {place}"


def caption(rng: np.random.Generator, scene: Scene, *, rare: float = 0.02) -> str:
    """A random caption of `scene` from the training split."""
    while True:
        relations = (scene.relation,) if scene.relation is not None and rng.random() < 0.9 else ()
        background = scene.background if rng.random() < 0.35 else None
        long = background is not None and len(scene.objects) <= 2 and rng.random() < 0.25
        groups = groups_of(scene, rng)
        relations = relations if len(groups) == 2 else ()
        text = write(rng, Query(groups, relations, background), rare=rare, long=long)
        if rng.random() < 0.02:
            text = misspell(rng, text)
        if split_of(text) == "train":
            return text


def misspell(rng: np.random.Generator, text: str, words: int = 1) -> str:
    """Drop, double or swap one letter in `words` content words of five letters or more."""
    tokens = text.split()
    content = [
        i for i, token in enumerate(tokens) if len(token) >= 5 and token.isalpha() and token in _content_words()
    ]
    for i in rng.permutation(content)[:words]:
        token, at = tokens[i], int(rng.integers(1, len(tokens[i]) - 2))
        kind = int(rng.integers(3))
        wrong = (
            token[:at] + token[at + 1 :],
            token[:at] + token[at] + token[at:],
            token[:at] + token[at + 1] + token[at] + token[at + 2 :],
        )[kind]
        if _spelling(wrong) == token:
            tokens[i] = wrong
    return " ".join(tokens)


# -------------------------------------------------------------------------------------------------- reading


_WORD = re.compile(r"[a-z0-9'-]+")


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, tuple[str, str]]:
    """Spelling -> (part of speech, meaning) for every single word and multiword token of the grammar."""
    words: dict[str, tuple[str, str]] = {}
    for kind, table in (("colour", COLOUR_WORDS), ("size", SIZE_WORDS), ("background", BACKGROUND_WORDS)):
        words |= {w: (kind, meaning) for meaning, spellings in table.items() for w in spellings}
    for meaning, spellings in SHAPE_WORDS.items():
        words |= {w: ("shape", meaning) for s in spellings for w in (s, _plural(s))}
    for meaning, spellings in RELATION_WORDS.items():
        words |= {w: ("relation", meaning) for w in spellings}
    words |= {
        w: ("relation", m)
        for w, m in {"on the left of": "left of", "on the right of": "right of", "underneath": "below"}.items()
    }
    words |= {w: ("trailing", meaning) for w, meaning in TRAILING_RELATIONS.items()}
    words |= {w: ("count", str(n)) for n, w in enumerate(NUMBERS, 1)} | {
        str(n): ("count", str(n)) for n in range(1, 5)
    }
    words |= {"a": ("count", "1"), "an": ("count", "1"), "single": ("count", "1"), "a single": ("count", "1")}
    words |= {"a pair of": ("count", "2"), "a couple of": ("count", "2"), "plus sign": ("shape", "cross")}
    words |= {"dark blue": ("background", "navy"), "and": ("and", ""), "plus signs": ("shape", "cross")}
    return words | {w: ("filler", "") for w in _FILLERS}


@lru_cache(maxsize=1)
def _content_words() -> frozenset[str]:
    return frozenset(w for w, (kind, _) in vocabulary().items() if kind not in ("filler", "and") and " " not in w)


def phrase_pattern(spellings: Iterable[str]) -> re.Pattern[str]:
    """Find phrases of several words first, the longest first, then single words."""
    phrases = sorted((w for w in spellings if " " in w), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b|{_WORD.pattern}")


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    return phrase_pattern(vocabulary())


def _edits(a: str, b: str) -> float:
    """Edits from `a` to `b`: insert, delete and swap cost 1, replace 1.5, another first letter 0.5 more."""
    rows: list[list[float]] = [[float(j) for j in range(len(b) + 1)]]
    for i, x in enumerate(a, 1):
        row = [float(i)]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + 1.5 * (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1] + 0.5 * (a[0] != b[0])


@lru_cache(maxsize=1)
def _known_words() -> frozenset[str]:
    return frozenset(word for phrase in vocabulary() for word in phrase.split())


@lru_cache(maxsize=4096)
def _spelling(word: str) -> str | None:
    """The intended known word, or None if there is no near one or the near ones differ in meaning."""
    if word in _known_words():
        return word
    if len(word) < 3:
        return None
    near = sorted((_edits(word, w), w) for w in _known_words() if len(w) > 2 and abs(len(w) - len(word)) <= 2)
    if not near or near[0][0] > (1.5 if len(word) <= 5 else 2.5):
        return None
    nearest = [w for distance, w in near if distance == near[0][0]]
    meanings = {vocabulary().get(w, ("part of a phrase", w)) for w in nearest}
    return nearest[0] if len(meanings) == 1 else None


class PromptError(UserError):
    """A prompt that the grammar of Shapes cannot read; the message names the words."""


@lru_cache(maxsize=65536)
def parse(prompt: str) -> Query:
    """Parse a prompt into a query.

    Raises:
        PromptError: a word is unknown, no shape is named, or a relation lacks one of its two things.
    """
    words = _WORD.findall(prompt.lower())
    corrected = " ".join(_spelling(word) or word for word in words)
    tokens = [(t, vocabulary().get(t)) for t in _pattern().findall(corrected)]
    unknown = [t for t, meaning in tokens if meaning is None]
    if unknown:
        raise PromptError(
            f"Shapes cannot read {', '.join(map(repr, unknown))} in the prompt {prompt!r}; see `mmalign shapes words`"
        )
    groups: list[Group] = []
    relations: list[tuple[int, str, int]] = []
    pending: dict[str, str] = {}
    background = opened = None
    for token, (kind, meaning) in ((t, m) for t, m in tokens if m is not None):
        if kind == "background":
            background = meaning
        elif kind == "shape":
            groups.append(Group(meaning, int(pending.get("count", 1)), pending.get("colour"), pending.get("size")))
            pending = {}
            if opened is not None:
                relations.append((opened[0], opened[1], len(groups) - 1))
                opened = None
        elif kind == "count":
            pending = {"count": meaning}
        elif kind in ("colour", "size"):
            if not pending and groups and getattr(groups[-1], kind) is None and opened is None:
                groups[-1] = Group(**{**groups[-1].__dict__, kind: meaning})  # "a circle that is red"
            else:
                pending[kind] = meaning
        elif kind in ("relation", "trailing"):
            if not groups or (kind == "trailing" and len(groups) < 2):
                raise PromptError(f"{token!r} lacks one of its two things in the prompt {prompt!r}")
            if kind == "relation":
                opened = (len(groups) - 1, meaning)
            else:
                relations.append((len(groups) - 1, meaning, len(groups) - 2))
    if not groups:
        raise PromptError(f"no shape is named in the prompt {prompt!r}; shapes are {', '.join(SHAPE_WORDS)}")
    if opened is not None:
        raise PromptError(f"{opened[1]!r} lacks its second thing in the prompt {prompt!r}")
    return Query(tuple(groups), tuple(relations), background)


assert set(RELATION_WORDS) == set(RELATIONS)
