"""What a GenEval prompt asks for, read from GenEval's metadata or from the prompt itself, and whether boxes show it.

Source: Ghosh et al. 2023, "GenEval" (arXiv:2310.11513), whose rules the authors' code settles: the boxes of a class
are sorted by score, and only the first `count` are looked at for colour and position.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from rewards.backbones.detectors import OBJECTS, Detection
from rewards.errors import RewardError, choices
from rewards.language.english import NUMBERS, number, plural

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
DEAD_ZONE = 0.1
"""The part of both objects' sizes by which a centre must be off before it counts."""

Box = Sequence[float]
ColoursOf = Callable[[Sequence[Detection], str], list[str]]


@dataclass(frozen=True)
class Wanted:
    """At least `count` objects of a name, all of a colour, all in relation to those of an earlier `Wanted`."""

    name: str
    count: int = 1
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """What an image must show, and from which number on there are too many of a name.

    `counting`: boxes are held to the stricter threshold, as GenEval does where numbers are asked for.
    """

    include: tuple[Wanted, ...]
    exclude: tuple[tuple[str, int], ...] = ()
    counting: bool = False

    @property
    def names(self) -> list[str]:
        """The objects that must be known."""
        return list(dict.fromkeys([*(wanted.name for wanted in self.include), *(name for name, _ in self.exclude)]))


class Verdict(NamedTuple):
    """Whether an image is right, the credits between 0 and 1 of what it was asked for, and what is wrong with it."""

    correct: bool
    credits: tuple[float, ...]
    reasons: tuple[str, ...]


def judge(objects: Mapping[str, Sequence[Detection]], task: Task, colours: ColoursOf, exact: bool = False) -> Verdict:
    """Hold what was found, the best first under each name, to a task.

    colours: names the colour of each of some objects. exact: there must be neither fewer nor more than asked for
    (Flow-GRPO's strict form), instead of no fewer, and fewer than `exclude` says.
    """
    credits: list[float] = []
    wrong: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in task.include:
        found = objects.get(wanted.name, [])
        credits.append(_share(len(found), wanted.count))
        if len(found) != wanted.count if exact else len(found) < wanted.count:
            wrong.append(f"{wanted.name}: {wanted.count} expected, {len(found)} found")
            credits += [0.0] * ((wanted.colour is not None) + (wanted.relation is not None))
            matched.append(None)
            continue
        found = found[: wanted.count]
        problems = []
        if wanted.colour is not None:
            seen = colours(found, wanted.name)
            credits.append(_share(seen.count(wanted.colour), wanted.count))
            if seen.count(wanted.colour) < wanted.count:
                problems.append(f"{wanted.name}: {wanted.colour} expected, {', '.join(seen)} found")
        if wanted.relation is not None:
            others = matched[wanted.target]
            holds = not problems and others is not None and _holds(wanted.relation, found, others)
            credits.append(float(holds))
            if not holds and not problems:
                problems.append(f"{wanted.name}: not {wanted.relation} {task.include[wanted.target].name}")
        wrong += problems
        matched.append(None if problems else found)
    if not exact:
        for name, limit in task.exclude:
            if len(objects.get(name, [])) >= limit:
                wrong.append(f"{name}: fewer than {limit} expected, {len(objects[name])} found")
    return Verdict(not wrong, tuple(credits), tuple(wrong))


def relations(box: Box, other: Box) -> set[str]:
    """Return where a box (left, top, right, bottom) lies, seen from another.

    The offset of the centres, less a tenth of both sizes on each axis, is divided by the length of the whole offset;
    an axis counts where more than one half is left.
    """
    offsets, rests = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - other[low] - other[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(other[high] - other[low])
        offsets.append(offset)
        rests.append(math.copysign(max(abs(offset) - DEAD_ZONE * sizes, 0.0), offset))
    if all(abs(rest) < 1e-3 for rest in rests):
        return set()
    across, down = (rest / math.hypot(*offsets) for rest in rests)
    held = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {relation for relation, part in held.items() if part > 0.5}


def parse_task(prompt: str) -> Task:
    """Read a prompt of GenEval's form: `[a photo of] THING [and THING ...]`, or `THING left of THING`.

    THING is an article or number, perhaps one of the ten colours, and one of the 80 objects. A number asks for
    exactly that many.

    Raises:
        RewardError: the prompt has another form, or names an object twice.
    """
    text = re.sub(r"^\s*(?:an? )?photo(?:graph)? of\s+", "", prompt.strip().rstrip(".").lower())
    related = re.split(rf"\s+(?:to the )?({'|'.join(RELATIONS)})\s+", text)
    if len(related) == 3:
        first, target = _thing(related[0], prompt), _thing(related[2], prompt)
        things = [target, (Wanted(first[0].name, first[0].count, first[0].colour, related[1]), first[1])]
    else:
        things = [_thing(piece, prompt) for piece in re.split(r"(?:\s*,)?\s+and\s+|\s*,\s*", text)]
    include = tuple(wanted for wanted, _ in things)
    if len({wanted.name for wanted in include}) < len(include):
        raise RewardError(f"geneval: {prompt!r} names an object twice, and boxes of one name cannot be told apart")
    exclude = tuple((wanted.name, wanted.count + 1) for wanted, counted in things if counted)
    return Task(include, exclude, counting=bool(exclude))


def read_tasks(metadata: str | PathLike[str] | Iterable[Mapping[str, Any]]) -> dict[str, Task]:
    """Read GenEval's metadata, a JSONL file or its rows: `{prompt, tag, include: [...], exclude: [...]}` each."""
    name = "metadata"
    if isinstance(metadata, (str, PathLike)):
        name = f"metadata {str(metadata)!r}"
        try:
            lines = Path(metadata).read_text(encoding="utf-8").splitlines()
            metadata = [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise RewardError(f"{name}: not readable as JSONL ({error})") from error
    tasks = {}
    for position, row in enumerate(metadata):
        try:
            include = tuple(_wanted(item, position) for position, item in enumerate(row["include"]))
            exclude = tuple((str(item["class"]), int(item["count"])) for item in row.get("exclude", []))
            tasks[row["prompt"]] = Task(include, exclude, row.get("tag") == "counting")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise RewardError(f"{name}, row {position + 1}: not GenEval's form: {reason}") from error
    return tasks


def check_names(task: Task, known: Collection[str], prompt: str) -> None:
    """Raise `RewardError` where a task asks for what a detector does not know."""
    for name in task.names:
        if name not in known:
            raise RewardError(f"geneval: {prompt!r}: the detector knows no {name!r}; {choices(name, known)}")


def _wanted(item: Mapping[str, Any], position: int) -> Wanted:
    relation, target = item.get("position") or (None, 0)
    if relation is not None and (relation not in RELATIONS or not 0 <= target < position):
        raise ValueError(f"position {item['position']!r}; a relation ({', '.join(RELATIONS)}) to an earlier object")
    if item.get("color") is not None and item["color"] not in COLOURS:
        raise ValueError(f"color {item['color']!r}; {choices(item['color'], COLOURS)}")
    return Wanted(str(item["class"]), int(item["count"]), item.get("color"), relation, target)


def _share(found: int, count: int) -> float:
    return max(0.0, 1 - abs(found - count) / count)


def _holds(relation: str, found: Sequence[Detection], others: Sequence[Detection]) -> bool:
    return all(relation in relations(one.box, other.box) for one in found for other in others)


_NOUNS = {form: name for name in OBJECTS for form in (plural(name), f"{name}s", name)}
_THING = re.compile(
    rf"(?:(?P<number>an?|\d+|{'|'.join(NUMBERS[1:])}) )?(?:(?P<colour>{'|'.join(COLOURS)})(?:[- ]colou?red)? )?"
    rf"(?P<noun>{'|'.join(sorted(_NOUNS, key=len, reverse=True))})"
)


def _thing(text: str, prompt: str) -> tuple[Wanted, bool]:
    """Return what a noun phrase asks for, and whether it counts."""
    found = _THING.fullmatch(text.strip())
    count = found and (1 if found["number"] in (None, "a", "an") else number(found["number"]))
    if not found or not count:
        raise RewardError(
            f"geneval cannot read {text.strip()!r} in {prompt!r}; give prompts like 'a photo of two dogs', 'a red "
            "apple and a cat', 'a dog left of a tv' with COCO's objects, or metadata=FILE in GenEval's form"
        )
    return Wanted(_NOUNS[found["noun"]], count, found["colour"]), found["number"] not in (None, "a", "an")
