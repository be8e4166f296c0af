"""Clips of moving Shapes: inside their walls, the same every time, and described by captions that can be read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmalign.core.resources import find
from mmalign.data.prompts import load_prompts
from mmalign.shapes.language import Group, PromptError, split_of
from mmalign.shapes.motion.language import Action, MotionQuery, caption, parse, query_of, write
from mmalign.shapes.motion.prompts import TEST_COUNTS, asks_for_held_out, write_motion_prompt_sets
from mmalign.shapes.motion.world import (
    FRAMES,
    HELD_OUT_MOTIONS,
    MOTIONS,
    Clip,
    Mover,
    frames_of,
    is_held_out,
    render,
    sample_clip,
)
from mmalign.shapes.world import HELD_OUT_OBJECTS, Object, inside

CLIPS = [sample_clip(np.random.default_rng(seed)) for seed in range(300)]
RED = Object("circle", "red", "small", 20, 32, 8.0)


def test_a_mover_is_where_its_motion_says() -> None:
    """Half of 24 px after half of the way, twice the radius at the end, another colour and presence from `at` on."""
    assert Mover(RED, "right", "fast", way=24).seen(4) == Object("circle", "red", "small", 32, 32, 8.0)
    assert Mover(RED, "up", "fast", way=24).seen(8) == Object("circle", "red", "small", 20, 8, 8.0)
    assert Mover(RED, "grow", end_radius=16.0).seen(8) == Object("circle", "red", "small", 20, 32, 16.0)
    turns = Mover(RED, "recolour", end_colour="blue", at=3)
    assert [turns.seen(frame).colour for frame in (2, 3)] == ["red", "blue"]  # type: ignore[union-attr]
    assert [Mover(RED, "appear", at=3).seen(frame) for frame in (2, 3)] == [None, RED]
    assert [Mover(RED, "disappear", at=3).seen(frame) for frame in (2, 3)] == [RED, None]


def test_shapes_stay_inside_and_apart() -> None:
    for clip in CLIPS:
        for things in frames_of(clip):
            assert all(inside(thing) for thing in things)
            for one, other in zip(things, things[1:], strict=False):
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_every_motion_occurs_and_no_held_out_combination() -> None:
    movers = [mover for clip in CLIPS for mover in clip.movers]
    assert {mover.motion for mover in movers} == set(MOTIONS)
    assert not {(m.thing.shape, m.motion) for m in movers} & HELD_OUT_MOTIONS
    assert not {(c, m.thing.shape) for m in movers for c in (m.thing.colour, m.end_colour)} & HELD_OUT_OBJECTS
    assert is_held_out(Clip((Mover(Object("star", "pink", "small", 40, 32, 8.0), "left", way=10.0),), "white"))
    assert is_held_out(
        Clip((Mover(Object("star", "pink", "small", 40, 32, 8.0), "recolour", end_colour="red"),), "white")
    )
    some = [sample_clip(np.random.default_rng(seed), held_out=True) for seed in range(60)]
    assert any(is_held_out(clip) for clip in some)


def test_the_same_clip_gives_the_same_bytes() -> None:
    clip = render(CLIPS[0])
    assert clip.shape == (FRAMES, 3, 64, 64) and clip.equal(render(sample_clip(np.random.default_rng(0))))


def test_captions_are_read_as_what_they_were_written_from() -> None:
    rng = np.random.default_rng(5)
    for clip in CLIPS:
        query = query_of(clip, rng)
        assert parse(write(rng, query, rare=0.3)) == query
        assert split_of(caption(rng, clip)) == "train"


def test_a_prompt_is_read() -> None:
    query = parse(
        "a video of a big scarlet dot slowly drifting leftwards while an azure box is getting bigger on a pale canvas"
    )
    assert query == MotionQuery(
        (Action(Group("circle", 1, "red", "large"), "left", "slow"), Action(Group("square", 1, "blue"), "grow")),
        "white",
    )  # fmt: skip
    query = parse("a ring turns green and then a star vanishes")
    assert query.ordered and query.actions[0].colour == "green" and query.actions[1].motion == "disappear"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red giraffe moves left", "cannot read 'giraffe'"),
        ("a red circle", "what 'circle' does is not said"),
        ("a red circle grows slowly", "what 'circle' does is not said"),
        ("a red circle moves left and grows", "'circle' does two things"),
        ("two circles move left", "cannot read 'move'"),
        ("two red circles moving left", "shows single things"),
        ("it moves left", "nothing is named that 'left' could be said of"),
        ("a red circle turns", "the colour that 'circle' turns is not said"),
        ("a red circle appears and then", "'then' lacks one of its two things"),
        ("a video", "no shape is named"),
    ],
)
def test_what_cannot_be_read_is_told(prompt: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        parse(prompt)


SETS = {"shapes-motion-test": "test", "shapes-motion-validation": "validation", "shapes-motion-train": "train"}


def test_prompt_sets_are_made_again_byte_for_byte(tmp_path) -> None:
    write_motion_prompt_sets(tmp_path)
    for name in SETS:
        assert (tmp_path / f"{name}.csv").read_bytes() == find(f"assets/prompts/{name}.csv").read_bytes()


def test_prompt_sets_are_apart_and_hold_out_what_they_should() -> None:
    for name, split in SETS.items():
        prompts = load_prompts(name)
        assert {split_of(p.text) for p in prompts} == {split} and len({p.text for p in prompts}) == len(prompts)
        for prompt in prompts:
            assert asks_for_held_out(parse(prompt.text)) == (prompt.category == "Conflicting"), prompt.text
    assert Counter(p.category for p in load_prompts("shapes-motion-test")) == TEST_COUNTS
    assert sum(TEST_COUNTS.values()) == 200
