"""Captions of Shapes made false by one small edit, otherwise in the original wording.

The edits are those of `rewards.language.contrast_rules`. One counts only if no image that the original describes
completely could be described by the result too: exchanging the colours of "a red and a blue circle" does not count,
nor does
"above" in place of "left of".
"""

from __future__ import annotations

from itertools import permutations

from mmalign.shapes.language import Group, PromptError, Query, parse
from mmalign.shapes.world import INVERSE
from rewards.language.contrast_rules import FALSE_KINDS, rule_contrast

_EVERY = 10_000


def false_captions(caption: str) -> dict[str, list[str]]:
    """Return captions that are false wherever `caption` is true, by the kind of edit; kinds without any are left out.

    Raises:
        PromptError: the caption is not one of Shapes.
    """
    original = parse(caption)
    found = {
        kind: [one for one in rule_contrast(caption, (kind,), _EVERY) if _is_false(original, one)]
        for kind in FALSE_KINDS
    }
    return {kind: captions for kind, captions in found.items() if captions}


def _is_false(original: Query, caption: str) -> bool:
    try:
        return contradicts(original, parse(caption))
    except PromptError:  # not a sentence of Shapes, so its truth is unknown
        return False


def contradicts(first: Query, second: Query) -> bool:
    """Tell whether no image fits both, if each names everything visible (though not every attribute)."""
    if first.background and second.background and first.background != second.background:
        return True
    things, others = _things(first), _things(second)
    if len(things) != len(others):
        return True
    matchings = (list(zip(things, order, strict=True)) for order in permutations(others))
    return not any(
        all(_alike(first.groups[a], second.groups[b]) for a, b in pairs)
        and not _relations_clash(first, second, set(pairs))
        for pairs in matchings
    )


def _things(query: Query) -> list[int]:
    """The group of each single thing."""
    return [index for index, group in enumerate(query.groups) for _ in range(group.count)]


def _alike(a: Group, b: Group) -> bool:
    attributes = ((a.colour, b.colour), (a.size, b.size))
    return a.shape == b.shape and all(None in (x, y) or x == y for x, y in attributes)


def _relations_clash(first: Query, second: Query, same: set[tuple[int, int]]) -> bool:
    """Tell whether a relation of one is the opposite of one of the other, for groups that are `same`."""
    for a, relation, b in first.relations:
        for c, other, d in second.relations:
            forwards = {(a, c), (b, d)} <= same and other == INVERSE[relation]
            backwards = {(a, d), (b, c)} <= same and other == relation
            if relation != INVERSE[relation] and (forwards or backwards):
                return True
    return False
