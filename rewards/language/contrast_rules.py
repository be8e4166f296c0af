"""Contrast prompts by rules of English: a caption varied so that it says something else.

The rules, each a kind that can be left out; what is written in quotation marks is never touched:

* `counts`      "two cats" -> "three cats", "a cat", "four cats"
* `drop`        "a cat and a dog" -> "a cat", "a dog" (still true of the image, though not the whole of it)
* `objects`     a thing replaced by another of its sort
* `attributes`  colours and sizes replaced by others
* `relations`   "to the left of" -> "to the right of", "above", ...; the two things exchanged
* `swap`        attributes exchanged between two things

They follow the contrast sets published with TextNorm (Kim et al. 2024, openreview Let8OMe20n), whose composition set
drops objects and varies counts; attributes and relations are varied here in the same manner.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, zip_longest
from typing import Any

from rewards.language.english import (
    NUMBERS,
    Phrase,
    is_plural,
    outside_quotes,
    phrases,
    plural,
    singular,
    with_right_articles,
    without_quotes,
    words,
)

KINDS = ("counts", "drop", "objects", "attributes", "relations", "swap")
FALSE_KINDS = tuple(kind for kind in KINDS if kind != "drop")
"""Kinds of which an edit may be false of the image: without one of its things a caption is still true."""
LIMIT = 24

# The first of each family is what others are replaced by; its other members are synonyms, so no contrast to it.
COLOURS = (
    ("red", "scarlet", "crimson"), ("blue", "azure", "cobalt"), ("green", "emerald", "grassy"),
    ("yellow", "golden", "lemon"), ("orange", "amber", "tangerine"), ("purple", "violet", "plum"),
    ("pink", "rose", "bubblegum"), ("black", "inky"), ("white", "snowy"), ("brown",), ("gray", "grey", "slate"),
    ("cyan", "aqua", "turquoise"),
)  # fmt: skip
_COLOUR_OF = {word: family for family in COLOURS for word in family} | {
    word: (word, colour) for word, colour in [("navy", "blue"), ("silver", "gray"), ("gold", "yellow")]
}
_OPPOSITES = [
    (("small", "little", "tiny"), ("large", "big", "huge")), (("short",), ("tall",)), (("thin",), ("thick",)),
    (("narrow",), ("wide",)), (("dark",), ("light", "bright", "pale")),
    (("young",), ("old",)), (("round", "circular"), ("square", "rectangular")),
]  # fmt: skip
_OPPOSITE = {word: b[0] for pair in _OPPOSITES for a, b in (pair, pair[::-1]) for word in a}
SORTS = (
    (("circle", "dot", "disk", "disc"), ("square", "box", "block"), ("triangle", "pyramid", "wedge"),
     ("star", "pentagram", "starlet"), ("ring", "hoop", "donut"), ("cross", "plus", "crucifix")),
    (("cat", "kitten"), ("dog", "puppy"), ("horse", "pony"), ("sheep", "lamb"), ("cow",), ("elephant",), ("bear",),
     ("zebra",), ("giraffe",), ("bird",), ("lion",), ("tiger",), ("rabbit",), ("frog",)),
    (("car", "automobile"), ("bus",), ("truck",), ("train",), ("bicycle", "bike"), ("motorcycle",), ("boat", "ship"),
     ("airplane", "plane", "aeroplane")),
    (("apple",), ("banana",), ("orange",), ("carrot",), ("broccoli",), ("pizza",), ("cake",), ("sandwich",)),
    (("chair",), ("couch", "sofa"), ("bed",), ("table",), ("bench",)),
    (("cup", "mug"), ("bottle",), ("bowl",), ("vase",), ("fork",), ("knife",), ("spoon",)),
    (("man",), ("woman",)), (("boy",), ("girl",)),
)  # fmt: skip
_MATERIALS = tuple((word,) for word in "wooden metal plastic leather paper stone ceramic knitted".split())
_MATERIAL_OF = {family[0]: family for family in _MATERIALS}
_SORT_OF = {word: (sort, family) for sort in SORTS for family in sort for word in family}
_ATTRIBUTES = {*_COLOUR_OF, *_OPPOSITE, *_MATERIAL_OF}
_SIDES = {
    "left": ("to the left of", "on the left side of", "left of"),
    "right": ("to the right of", "on the right side of", "right of"),
    "above": ("above", "on top of", "higher than", "over"),
    "below": ("below", "underneath", "beneath", "lower than", "under"),
}
_DEPTHS = {"front": ("in front of",), "behind": ("behind",)}
_OTHER_SIDES = {
    "left": ("right", "above", "below"), "right": ("left", "above", "below"), "above": ("below", "left", "right"),
    "below": ("above", "left", "right"), "front": ("behind",), "behind": ("front",),
}  # fmt: skip
_JOINED = re.compile(r"[\s,]*(and|with|next to|beside|adjacent to|near)\s+")
_VERB = re.compile(r"\s+(?:that|which)\s+(is|are)\b")
_TRAILING = (("to its left", "to its right"), ("above it", "below it"))


def rule_contrast(prompt: str, kinds: Iterable[str] = KINDS, limit: int = LIMIT) -> list[str]:
    """Vary a caption by rules; at most `limit` prompts, drawn from the kinds in turn, always the same.

    Empty where the caption has nothing that the rules know.
    """
    rounds = zip_longest(*(_RULES[kind](prompt) for kind in kinds))
    made = [outside_quotes(text, _tidy).strip() for drawn in rounds for text in drawn if text is not None]
    return without_duplicates(prompt, made)[:limit]


def _counts(text: str) -> Iterator[str]:
    things = [thing for thing in _objects(text) if thing.count]
    alternatives = [
        (thing, other) for rank in range(4) for thing in things for other in _other_counts(thing)[rank:][:1]
    ]
    for thing, other in alternatives:
        noun = singular(thing.head.text)
        noun = noun if other == 1 else plural(noun)
        said = "a" if other == 1 else NUMBERS[other] if other < len(NUMBERS) else str(other)
        assert thing.determiner is not None
        edits = [(thing.determiner.start, thing.determiner.end, said), (thing.head.start, thing.end, noun)]
        if verb := _VERB.match(text, thing.end):
            edits.append((*verb.span(1), "is" if other == 1 else "are"))
        yield _edited(text, *edits)


def _other_counts(thing: Phrase) -> list[int]:
    """The four nearest counts, the nearest first; of one thing, two to four."""
    assert thing.count
    near = [thing.count + 1, thing.count - 1, thing.count + 2, thing.count - 2, thing.count + 3]
    return [count for count in near if count > 0][:4]


def _drop(text: str) -> Iterator[str]:
    without = text
    for said in (wording for pair in _TRAILING for wording in pair):
        without = _replaced(without, f" {said}", "")
    for first, second in pairwise(_objects(without)):
        between = without[first.end : second.start]
        if _relation(without, first, second) or _JOINED.fullmatch(between):
            yield _edited(without, (first.end, second.end, ""))
            yield _edited(without, (first.start, second.start, ""))


def _replace(text: str) -> Iterator[str]:
    for rank in range(3):
        for thing in _objects(text):
            yield from _replaced_head(text, thing, rank)


def _replaced_head(text: str, thing: Phrase, rank: int) -> Iterator[str]:
    if thing.modifiers and thing.modifiers[-1].text.lower() in ("teddy", "hot"):
        return  # teddy bears and hot dogs are of another sort
    said = thing.head.text.lower()
    sort, family = _SORT_OF.get(singular(said), ((), ()))
    others = _after(sort, family)
    if rank < len(others):
        new = plural(others[rank][0]) if is_plural(said) else others[rank][0]
        yield _edited(text, (thing.head.start, thing.end, new))


def _attributes(text: str) -> Iterator[str]:
    heads = {thing.head.start for thing in phrases(text) if thing.determiner is not None or thing.modifiers}
    found = [word for word in words(text) if word.start not in heads]
    for word in found:
        if word.text.lower() in _OPPOSITE:
            yield _edited(text, (word.start, word.end, _OPPOSITE[word.text.lower()]))
    for table, family_of in ((COLOURS, _COLOUR_OF), (_MATERIALS, _MATERIAL_OF)):
        present = {word for named in found for word in family_of.get(named.text.lower(), ())}
        for rank in range(4):
            for word in found:
                family = family_of.get(word.text.lower())
                if family is not None:
                    # What the caption has elsewhere might make a true caption of it; `swap` sees to those.
                    others = [other for other in _after(table, family) if not present & set(other)]
                    for other in others[rank : rank + 1]:
                        yield _edited(text, (word.start, word.end, other[0]))


def _relations(text: str) -> Iterator[str]:
    for first, second in pairwise(_objects(text)):
        relation = _relation(text, first, second)
        if relation is None:
            continue
        side, start, end = relation
        ours, theirs = text[first.start : first.end], text[second.start : second.end]
        yield _edited(text, (first.start, first.end, theirs), (second.start, second.end, ours))
        for other in _OTHER_SIDES[side]:
            yield _edited(text, (start, end, (_SIDES | _DEPTHS)[other][0]))
    for pair in _TRAILING:
        for said, opposite in (pair, pair[::-1]):
            if said in text:
                yield _replaced(text, said, opposite)


def _swap(text: str) -> Iterator[str]:
    for first, second in pairwise(_objects(text)):
        ours, theirs = _attribute_span(first), _attribute_span(second)
        said, other = text[slice(*ours)], text[slice(*theirs)]
        alike = [(singular(thing.head.text.lower()), thing.count) for thing in (first, second)]
        if alike[0] == alike[1] and not _relation(text, first, second):
            continue  # a red circle and a blue circle are a blue circle and a red circle
        if said.lower() != other.lower():
            yield _edited(text, (*ours, other), (*theirs, said))
        colours = [[word for word in thing.modifiers if word.text.lower() in _COLOUR_OF] for thing in (first, second)]
        if all(len(found) == 1 for found in colours):
            (one,), (two,) = colours
            yield _edited(text, (one.start, one.end, two.text), (two.start, two.end, one.text))


_RULES: dict[str, Callable[[str], Iterator[str]]] = {
    "counts": _counts,
    "drop": _drop,
    "objects": _replace,
    "attributes": _attributes,
    "relations": _relations,
    "swap": _swap,
}


def _objects(text: str) -> list[Phrase]:
    return [thing for thing in phrases(text) if thing.kind == "object" and not _is_predicate(thing)]


def _is_predicate(thing: Phrase) -> bool:
    """Tell the "red" of "a circle that is red" from a thing."""
    return thing.determiner is None and len(thing.words) == 1 and thing.head.text.lower() in _ATTRIBUTES


def _relation(text: str, first: Phrase, second: Phrase) -> tuple[str, int, int] | None:
    """Return the side that is named between two neighbouring phrases, and where."""
    between, found = without_quotes(text)[first.end : second.start].lower(), []
    for sides in (_SIDES, _DEPTHS):
        for side, wordings in sides.items():
            matches = [m for wording in wordings if (m := re.search(rf"\b{wording}\b", between))]
            found += [(side, first.end + match.start(), first.end + match.end()) for match in matches]
    return max(found, key=lambda match: match[2] - match[1], default=None)


def _attribute_span(thing: Phrase) -> tuple[int, int]:
    """Return the span from the first modifier to the last known attribute; the rest may be of the noun: teddy bear."""
    known = [word for word in thing.modifiers if word.text.lower() in _ATTRIBUTES]
    start = thing.words[0].start
    return (start, known[-1].end) if known else (start, start)


def _after(items: Any, item: Any) -> list[Any]:
    """Return the other items, beginning after the given one."""
    items = list(items)
    place = items.index(item) if item in items else -1
    return [other for other in items[place + 1 :] + items[: max(place, 0)] if other != item]


def _replaced(text: str, old: str, new: str) -> str:
    return outside_quotes(text, lambda part: part.replace(old, new, 1))


def _edited(text: str, *edits: tuple[int, int, str]) -> str:
    """Replace spans; an insertion before a word gets its space in `_tidy`."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + (f"{new} " if start == end else new) + text[end:]
    return text


def _tidy(text: str) -> str:
    text = re.sub(r"\s+([,.;!?])", r"\1", re.sub(r"\s+", " ", text))
    many = "|".join(NUMBERS[2:])
    text = re.sub(rf"\b([Tt]here) is ({many})\b", r"\1 are \2", text)
    return with_right_articles(re.sub(r"\b([Tt]here) are (an?|one)\b", r"\1 is \2", text))


def without_duplicates(prompt: str, contrast: Iterable[str]) -> list[str]:
    """Return contrast prompts without the true prompt and repetitions, whatever the case, spaces and final stop."""
    seen, kept = {plain(prompt)}, []
    for other in contrast:
        if plain(other) not in seen:
            seen.add(plain(other))
            kept.append(other)
    return kept


def plain(text: str) -> str:
    """Return a caption without what does not change its sense: case, spaces, the final stop."""
    return " ".join(text.casefold().split()).rstrip(" .")
