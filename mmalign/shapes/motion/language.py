"""The language of moving Shapes: captions written from clips, and prompts parsed into queries.

    a red circle moves left slowly and a small blue square turns green on a white background

The words for things, sizes and backgrounds are those of :mod:`mmalign.shapes.language`; what a thing does comes
behind it. Every prompt of this grammar says of every thing what it does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmalign.shapes import language
from mmalign.shapes.language import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    Group,
    PromptError,
    article,
    group_phrase,
    phrase_pattern,
    pick_word,
    split_of,
)
from mmalign.shapes.motion.world import MOTIONS, Clip

# As in the image world: the first spelling is the common one, the last is rare. `~` splits a verb from its -ing form.
_VERBS = ("moves~moving", "goes~going", "drifts~drifting")
DIRECTION_WORDS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}
SPEED_WORDS = {"slow": ("slowly", "gently", "sluggishly"), "fast": ("fast", "quickly", "rapidly")}
ACTION_WORDS = {
    "grow": ("grows~growing", "gets bigger~getting bigger", "expands~expanding"),
    "shrink": ("shrinks~shrinking", "gets smaller~getting smaller", "contracts~contracting"),
    "recolour": ("turns~turning", "becomes~becoming", "changes to~changing to"),
    "appear": ("appears~appearing", "shows up~showing up", "emerges~emerging"),
    "disappear": ("disappears~disappearing", "vanishes~vanishing", "fades away~fading away"),
    "still": ("stays still~staying still", "does not move~not moving", "rests~resting"),
}
_FILLERS = ("video", "clip", "while", "a video of", "a clip of", "a short video of")
_SENTENCES = ("{x}", "{x}", "{x}", "in this video {x}", "we see that {x}")
_SCENES = ("a video of {x}", "a clip of {x}", "a short video of {x}")
_PLACES = ("on {b}", "against {b}")


@dataclass(frozen=True)
class Action:
    """One thing and what it does; what the prompt does not name is None. `colour` is the one a recolouring ends in."""

    group: Group
    motion: str
    speed: str | None = None
    colour: str | None = None


@dataclass(frozen=True)
class MotionQuery:
    """The content of a prompt. `ordered`: the last action comes after the first."""

    actions: tuple[Action, ...]
    background: str | None = None
    ordered: bool = False


# -------------------------------------------------------------------------------------------------- writing


def write(rng: np.random.Generator, query: MotionQuery, *, rare: float = 0.04) -> str:
    """Word a query as a caption. `rare` is the chance of a word's rarest spelling."""
    scene = rng.random() < 0.3
    things = [
        f"{group_phrase(rng, a.group, rare, False)} {_doing(rng, a, rare, participle=scene)}" for a in query.actions
    ]
    joint = " and then " if query.ordered else " while " if rng.random() < 0.15 else " and "
    text = str(rng.choice(_SCENES if scene else _SENTENCES)).format(x=joint.join(things))
    if query.background is None:
        return text
    background = article(f"{pick_word(rng, BACKGROUND_WORDS[query.background], rare)} background")
    return f"{text} {str(rng.choice(_PLACES)).format(b=background)}"


def _doing(rng: np.random.Generator, action: Action, rare: float, participle: bool) -> str:
    moves = action.motion in DIRECTION_WORDS
    verb = pick_word(rng, _VERBS if moves else ACTION_WORDS[action.motion], rare).split("~")[participle]
    words = [verb]
    if moves:
        words.append(pick_word(rng, DIRECTION_WORDS[action.motion], rare))
    if action.colour is not None:
        words.append(pick_word(rng, COLOUR_WORDS[action.colour], rare))
    if action.speed is not None:
        words.insert(0 if rng.random() < 0.2 else len(words), pick_word(rng, SPEED_WORDS[action.speed], rare))
    return " ".join(words)


def query_of(clip: Clip, rng: np.random.Generator) -> MotionQuery:
    """A query that is true of a clip: speeds, sizes and the background are named at random."""
    actions = []
    for mover in clip.movers:
        sized = mover.end_radius is None and rng.random() < 0.2
        group = Group(mover.thing.shape, 1, mover.thing.colour, mover.thing.size if sized else None)
        speed = mover.speed if rng.random() < 0.6 else None
        actions.append(Action(group, mover.motion, speed, mover.end_colour))
    if not clip.ordered and rng.random() < 0.5:
        actions.reverse()
    return MotionQuery(tuple(actions), clip.background if rng.random() < 0.35 else None, clip.ordered)


def caption(rng: np.random.Generator, clip: Clip) -> str:
    """A random caption of `clip` from the training split."""
    while True:
        text = write(rng, query_of(clip, rng))
        if split_of(text) == "train":
            return text


# -------------------------------------------------------------------------------------------------- reading


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, tuple[str, str]]:
    """Spelling -> (part of speech, meaning) of every word and phrase, those of the image world included."""
    words = {w: m for w, m in language.vocabulary().items() if m[0] not in ("relation", "trailing")}
    words |= {w: ("speed", meaning) for meaning, spellings in SPEED_WORDS.items() for w in spellings}
    words |= {w: ("direction", meaning) for meaning, spellings in DIRECTION_WORDS.items() for w in spellings}
    words |= {w: ("verb", "") for both in _VERBS for w in both.split("~")}
    for meaning, spellings in ACTION_WORDS.items():
        words |= {w: ("action", meaning) for both in spellings for w in both.split("~")}
    return words | {w: ("filler", "") for w in _FILLERS} | {"then": ("then", ""), "and then": ("then", "")}


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    return phrase_pattern(vocabulary())


@lru_cache(maxsize=65536)
def parse(prompt: str) -> MotionQuery:
    """Parse a prompt into a query.

    Raises:
        PromptError: a word is unknown, no thing is named, or a thing lacks what it does or does two things.
    """
    tokens = [(t, vocabulary().get(t)) for t in _pattern().findall(prompt.lower())]
    unknown = [t for t, meaning in tokens if meaning is None]
    if unknown:
        raise PromptError(
            f"Shapes cannot read {', '.join(map(repr, unknown))} in the prompt {prompt!r} for a video; "
            "see `mmalign shapes words`"
        )
    actions: list[Action] = []
    pending: dict[str, str] = {}
    background, ordered = None, False
    for token, (kind, meaning) in ((t, m) for t, m in tokens if m is not None):
        last = actions[-1] if actions else None
        if kind == "background":
            background = meaning
        elif kind == "then":
            ordered = True
        elif kind == "shape":
            if pending.pop("count", "1") != "1":
                raise PromptError(f"a video of Shapes shows single things, not several alike, in {prompt!r}")
            actions.append(Action(Group(meaning, 1, **pending), ""))
            pending = {}
        elif kind == "colour" and last and last.motion == "recolour" and last.colour is None:
            actions[-1] = replace(last, colour=meaning)
        elif kind in ("count", "colour", "size"):
            pending[kind] = meaning
        elif kind in ("direction", "action", "speed"):
            if last is None:
                raise PromptError(f"nothing is named that {token!r} could be said of in the prompt {prompt!r}")
            if last.speed if kind == "speed" else last.motion:
                raise PromptError(f"{last.group.shape!r} does two things in the prompt {prompt!r}")
            actions[-1] = replace(last, speed=meaning) if kind == "speed" else replace(last, motion=meaning)
    _check(actions, ordered, prompt)
    return MotionQuery(tuple(actions), background, ordered)


def _check(actions: list[Action], ordered: bool, prompt: str) -> None:
    if not actions:
        raise PromptError(f"no shape is named in the prompt {prompt!r}; shapes are {', '.join(language.SHAPE_WORDS)}")
    for action in actions:
        if not action.motion or (action.speed and action.motion not in DIRECTION_WORDS):
            raise PromptError(f"what {action.group.shape!r} does is not said in the prompt {prompt!r}")
        if action.motion == "recolour" and action.colour is None:
            raise PromptError(f"the colour that {action.group.shape!r} turns is not said in the prompt {prompt!r}")
    if ordered and len(actions) < 2:
        raise PromptError(f"'then' lacks one of its two things in the prompt {prompt!r}")


assert set(DIRECTION_WORDS) | set(ACTION_WORDS) == set(MOTIONS)
